def run(context):
    return []
