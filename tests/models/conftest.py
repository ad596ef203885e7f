"""transformers loads torchaudio where it is installed, as it is here for its Kaldi code: its binary fits one torch only."""

from __future__ import annotations

import sys

_before = sys.modules.get("torchaudio")
sys.modules["torchaudio"] = None  # type: ignore[assignment]
try:
    # It looks once, and remembers.
    from transformers import HubertModel  # noqa: F401
finally:
    if _before is None:
        del sys.modules["torchaudio"]
    else:
        sys.modules["torchaudio"] = _before
