# Sourced by quickstart.sh and test.sh: a virtual environment with pinned packages, made once and used again after.
# $1: "pinned" (scripts/constraints.txt) or "lowest" (every package at its lower bound in pyproject.toml).
# PYTHON: the interpreter to make it with; VENV: where to make it.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
constraints="$root/scripts/constraints.txt"
if [ "$1" = lowest ]; then
  venv="${VENV:-$root/.venv-lowest}"
  mkdir -p "$venv"
  constraints="$venv/constraints.txt"
  grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' "$root/pyproject.toml" | grep -v setuptools | tr -d '"' | sed 's/>=/==/' | sort -u > "$constraints"
fi
# The path counts too: the environment of a copied folder would run the code of the original.
installed="$venv/installed-$(cat "$constraints" "$root/pyproject.toml" <(echo "$root") | sha256sum | cut -c1-16)"

if [ ! -f "$installed" ]; then
  echo "Setting up $venv (once; one to five minutes) ..."
  minor=$([ "$1" = lowest ] && echo 10 || echo 11)  # the pinned transformers and numpy need Python 3.11
  "${PYTHON:-python3}" -c "import sys; sys.exit('Python 3.$minor or newer is needed, found ' + sys.version if sys.version_info < (3, $minor) else 0)"
  "${PYTHON:-python3}" -m venv "$venv"
  rm -f "$venv"/installed-*
  # torch first and by its exact version: a range would fetch a newer build with gigabytes of CUDA.
  "$venv/bin/pip" install --quiet --disable-pip-version-check "$(grep '^torch==' "$constraints")"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$constraints" --editable "$root[dev]"
  # Beam search. kenlm is compiled; where there is no compiler, its tests are left out. pyctcdecode pins an old numpy.
  "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$constraints" --editable "$root[lm]" \
    && "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$constraints" --no-deps pyctcdecode \
    || echo "kenlm could not be built (see above; it needs g++): no n-gram and no beam search. To try again, delete $venv"
  touch "$installed"
fi
