"""A stand-in for NVIDIA's apex as it was while it had amp, or for Ascend's (see amp.py).

APEX_STUB_VENDOR=ascend makes it Ascend's, as an import of ascend_apex does.
"""

import os

if os.environ.get("APEX_STUB_VENDOR") == "ascend":
    import ascend_apex
