from types import ModuleType

import diffusers

from families import edits, images, more_images, more_videos, newer_images, newest_videos, videos
from families.family import Family, call

MAIN = (images, newer_images, videos)
OTHERS: tuple[ModuleType, ...] = (more_images, more_videos, newest_videos, edits)
if hasattr(diffusers, "Krea2Pipeline"):  # newer than the oldest diffusers of `make oldest`
    from families import newest_images

    OTHERS += (newest_images,)
FAMILIES: dict[str, Family] = {family.host: family for part in MAIN for family in part.FAMILIES}
MORE: dict[str, Family] = {family.host: family for part in OTHERS for family in part.FAMILIES}

__all__ = ["FAMILIES", "MORE", "Family", "call"]
