"""Which steps the network runs at: lists of anchors, and rules that decide while a run goes on."""

from .integration.adaptive import FirstBlock as FirstBlock
from .integration.adaptive import SpeCa as SpeCa
from .integration.adaptive import TeaCache as TeaCache
from .integration.masks import anchors_mask as anchors_mask
from .integration.masks import mask_anchors as mask_anchors
from .integration.masks import scm as scm
from .integration.schedule import PUBLISHED_L2P as PUBLISHED_L2P
from .integration.schedule import diffusers_interval as diffusers_interval
from .integration.schedule import interval as interval
from .integration.schedule import magcache as magcache
from .integration.schedule import uniform as uniform
from .integration.schedule import warped as warped

__all__ = [
    "PUBLISHED_L2P",
    "FirstBlock",
    "SpeCa",
    "TeaCache",
    "anchors_mask",
    "diffusers_interval",
    "interval",
    "magcache",
    "mask_anchors",
    "scm",
    "uniform",
    "warped",
]
