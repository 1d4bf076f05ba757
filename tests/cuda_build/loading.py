def problems(extension):
    return []
