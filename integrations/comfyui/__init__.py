"""ComfyUI custom nodes of foreseer: put this folder, or a link to it, into `custom_nodes`."""

from .nodes import comfy_entrypoint as comfy_entrypoint
