"""What heads share: the decoder, dropout before the classifiers, and the branch of the auxiliary loss."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...user_error import ConfigError
from ..decoders import build_decoder, conv_norm_relu

__all__ = ["AuxiliaryBranch", "Trunk"]

#: Feature that the auxiliary loss reads, as in PSPNet.
AUXILIARY_FEATURE = "res4"


class Trunk(nn.Module):
    """Backbone features -> the one or two feature maps that classifiers read.

    Args:
        decoder: features -> (N, D, h, w).
        dropout: probability of dropping a channel before the classifiers.
        auxiliary: features -> (N, D', h', w') for an auxiliary loss, or None.
        auxiliary_weight: factor of the auxiliary losses.

    Attributes:
        out_channels: D.

    Source: PSPNet (CVPR 2017): auxiliary loss.
    """

    @configurable
    def __init__(
        self,
        *,
        decoder: nn.Module,
        dropout: float = 0.1,
        auxiliary: nn.Module | None = None,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        self.decoder, self.dropout = decoder, nn.Dropout2d(dropout)
        self.out_channels: int = decoder.out_channels
        self.auxiliary, self.auxiliary_weight = auxiliary, auxiliary_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD``."""
        keys = cfg.MODEL.SEM_SEG_HEAD
        return {
            "decoder": build_decoder(cfg, input_shape),
            "dropout": keys.DROPOUT,
            "auxiliary": AuxiliaryBranch(cfg, input_shape) if keys.AUX_LOSS_WEIGHT > 0 else None,
            "auxiliary_weight": keys.AUX_LOSS_WEIGHT,
        }

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) the decoder's output."""
        return self.decoder(features)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) the same after dropout: what the classifiers read."""
        return self.dropout(self.embed(features))

    def auxiliary_features(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D', h', w') what the auxiliary classifiers read; only where there is an auxiliary branch."""
        return self.dropout(self.auxiliary(features))


class AuxiliaryBranch(nn.Module):
    """3x3 convolution, norm and ReLU on res4, for deep supervision.

    Args:
        input_shape: shapes of the backbone's features.
        channels: width of the output.
        norm: name of the norm.

    Raises:
        ValueError: the backbone does not give res4.
    """

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], *, channels: int, norm: str) -> None:
        super().__init__()
        if AUXILIARY_FEATURE not in input_shape:
            raise ConfigError(
                f"the auxiliary loss reads {AUXILIARY_FEATURE}, but the backbone gives {list(input_shape)}: add it to "
                "MODEL.RESNETS.OUT_FEATURES, or set MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT to 0"
            )
        self.out_channels = channels
        self.conv = conv_norm_relu(input_shape[AUXILIARY_FEATURE].channels, channels, 3, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD``."""
        keys = cfg.MODEL.SEM_SEG_HEAD
        return {"input_shape": input_shape, "channels": keys.CONVS_DIM, "norm": keys.NORM}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D', h, w) at the resolution of res4."""
        return self.conv(features[AUXILIARY_FEATURE])
