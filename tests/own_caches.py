"""Gives every test process a place of its own for remote code, before Transformers reads where that is.

So tests write neither into the user's place nor into each other's. It stays the same for all tests of a process, since
Python remembers where it first found the package of remote code.
"""

import atexit
import os
import shutil
import sys
import tempfile

if "transformers" in sys.modules:
    raise RuntimeError("Transformers was imported before own_caches, and has chosen its place for remote code already")
FOLDER = tempfile.mkdtemp(prefix="roe-remote-code-")
os.environ["HF_MODULES_CACHE"] = FOLDER
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
