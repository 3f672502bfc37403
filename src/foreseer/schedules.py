"""Which steps the network runs at: lists of anchors, and rules that decide while a run goes on."""

from foreseer.integration.policy import FirstBlock as FirstBlock
from foreseer.integration.policy import SeaCache as SeaCache
from foreseer.integration.policy import SpeCa as SpeCa
from foreseer.integration.policy import TeaCache as TeaCache
from foreseer.integration.schedule import PUBLISHED_L2P as PUBLISHED_L2P
from foreseer.integration.schedule import Shallow as Shallow
from foreseer.integration.schedule import anchors_mask as anchors_mask
from foreseer.integration.schedule import diffusers_interval as diffusers_interval
from foreseer.integration.schedule import interval as interval
from foreseer.integration.schedule import magcache as magcache
from foreseer.integration.schedule import mask_anchors as mask_anchors
from foreseer.integration.schedule import scm as scm
from foreseer.integration.schedule import spectrum as spectrum
from foreseer.integration.schedule import three_kinds as three_kinds
from foreseer.integration.schedule import uniform as uniform
from foreseer.integration.schedule import warped as warped

__all__ = [
    "PUBLISHED_L2P",
    "FirstBlock",
    "SeaCache",
    "Shallow",
    "SpeCa",
    "TeaCache",
    "anchors_mask",
    "diffusers_interval",
    "interval",
    "magcache",
    "mask_anchors",
    "scm",
    "spectrum",
    "three_kinds",
    "uniform",
    "warped",
]
