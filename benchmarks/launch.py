"""Run a command, discard its output and print its cost as JSON; see `timing.run_process` for why this is a script."""

import json
import os
import sys
import time

discard = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=discard)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - start
if status:
    sys.exit(f"exit status {os.waitstatus_to_exitcode(status)}")
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_rss": usage.ru_maxrss * unit}))
