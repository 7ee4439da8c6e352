#!/usr/bin/env bash
# Sets up an environment and runs the tests:  bash scripts/test.sh [--lowest] [pytest options]
set -euo pipefail

versions=pinned
if [ "${1:-}" = --lowest ]; then
  versions=lowest
  shift
fi
source "$(dirname "$0")/environment.sh" "$versions"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$venv/bin/ruff" check .
"$venv/bin/python" -m pytest -n 2 --dist worksteal -m "not slow and not gpu" "$@"
