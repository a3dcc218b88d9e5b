def write_report(e, p):
    return p
