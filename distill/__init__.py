from .. import __version__ as __version__
from ..extras import require

require("train", "foreseer.distill")
