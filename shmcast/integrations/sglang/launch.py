"""SGLang's server with shmcast in it: `python -m shmcast.integrations.sglang.launch --model-path ...`.

For releases before 0.5.12, which look for no plugins. A process that is spawned imports the module that its parent was
started with, so that this one patches there too; `sglang.launch_server` itself is run inside of it.
"""

import os
import runpy

from shmcast.integrations.sglang import plugin

os.environ.setdefault("SHMCAST_SGLANG", "1")
plugin()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")  # alter_sys would have children import that one
