def write_report(rows, config, output):
    return "x"
