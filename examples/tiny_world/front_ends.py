"""What the tiny world's bases see with: stock LLaVA's tower, and small ones in the manner of LLaVA-HR and VILA-1.5.

Each makes one token of each of the 16 cells, so that decoder and lessons are the same for all.
"""

from dataclasses import dataclass

from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from ...configuration_frontend import STOCK_PROJECTOR
from ...configuration_hr_vision import LlavaHrVisionConfig
from .world import CELL_PIXELS, GRID, IMAGE_PIXELS

WIDTHS = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4}


@dataclass(frozen=True)
class FrontEnd:
    """A tower, a projector, and what the processor has to know of them.

    Attributes:
        vision: the tower's configuration.
        side: of the picture the tower is given, in pixels.
        projector_type: as in `FrontendLlavaConfig`.
        has_class_token: whether a class token precedes the patches.
    """

    vision: PreTrainedConfig
    side: int = IMAGE_PIXELS
    projector_type: str = STOCK_PROJECTOR
    has_class_token: bool = False

    @property
    def patch_size(self) -> int:
        """Pixels per token and side."""
        return self.side // GRID

    @property
    def feature_strategy(self) -> str:
        """`vision_feature_select_strategy`."""
        return "default" if self.has_class_token else "full"


def stock() -> FrontEnd:
    """CLIP on the pictures as they are, a patch per cell."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_PIXELS, patch_size=CELL_PIXELS, num_hidden_layers=3, projection_dim=96, **WIDTHS
    )
    return FrontEnd(vision, has_class_token=True)


def llava_hr() -> FrontEnd:
    """Two towers on pictures of 128 pixels: CLIP on a grid of 4 x 4, ConvNeXt with a map of the same size."""
    fast = {"image_size": 336, "patch_size": 84, "num_hidden_layers": 4, "projection_dim": 96, **WIDTHS}
    slow = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1], "layer_norm_eps": 1e-6}
    side = 32 * GRID
    return FrontEnd(LlavaHrVisionConfig(fast_config=fast, slow_config=slow, image_size=side), side)


def vila() -> FrontEnd:
    """SigLIP with four patches per cell, which the projector makes one token of."""
    vision = SiglipVisionConfig(
        image_size=IMAGE_PIXELS, patch_size=CELL_PIXELS // 2, num_hidden_layers=3, vision_use_head=False, **WIDTHS
    )
    return FrontEnd(vision, projector_type="mlp_downsample")


FRONT_ENDS = {"stock": stock, "llava_hr": llava_hr, "vila": vila}
