from families import (
    edits,
    images,
    more_images,
    more_videos,
    newer_images,
    newest_images,
    newest_videos,
    videos,
)
from families.family import Family, call

MAIN = (images, newer_images, videos)
OTHERS = (more_images, newest_images, more_videos, newest_videos, edits)
FAMILIES: dict[str, Family] = {family.host: family for part in MAIN for family in part.FAMILIES}
MORE: dict[str, Family] = {family.host: family for part in OTHERS for family in part.FAMILIES}

__all__ = ["FAMILIES", "MORE", "Family", "call"]
