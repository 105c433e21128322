"""Meta's own models, built for our configs: what the bridge and the parity tests compare with.

The official packages import torchvision, whose compiled operators need the very PyTorch build that
they were compiled against; there is no torchvision for a CPU-only PyTorch of the same number.
Only non-maximum suppression is used from it, so where the operators do not load, this module
declares it and supplies a kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from convert.torch_io import import_torch
from samjax.models.sam import SamConfig
from samjax.models.sam2_config import Sam2Config

_GALORE = "galore_torch_without_bitsandbytes"


def import_segment_anything() -> Any:
    """Meta's `segment_anything` package, importable beside any PyTorch build.

    Raises:
        ImportError: it, torchvision or PyTorch is not installed; names the extra that brings it.
    """
    return _import_reference("segment_anything")


def import_sam2() -> Any:
    """Meta's `sam2` package; as `import_segment_anything`."""
    return _import_reference("sam2")


@functools.cache
def _import_reference(package: str) -> Any:
    torch = import_torch()
    try:
        _import_torchvision(torch)
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"Meta's reference code cannot be imported ({error}): pip install 'samjax[reference]'"
        ) from error


def galore_module(name: str) -> Any:
    """A module of galore-torch without its package, whose ``__init__`` wants bitsandbytes.

    Raises ``ImportError`` if galore-torch, or transformers, which it needs, is not installed.
    """
    package = importlib.util.find_spec("galore_torch")
    if package is None or package.submodule_search_locations is None:
        raise ImportError("galore-torch is not installed: pip install --no-deps galore-torch")
    shell = sys.modules.setdefault(_GALORE, types.ModuleType(_GALORE))
    shell.__path__ = list(package.submodule_search_locations)
    return importlib.import_module(f"{_GALORE}.{name}")


def build_reference_sam(config: SamConfig) -> Any:
    """Upstream's `Sam` for any of our configs, randomly initialised, in eval mode, float32.

    The module has upstream's classes throughout. Upstream can only build square images; for a
    rectangle the position tables are exchanged for ones of the right shape, and the resulting
    `image_encoder`, `prompt_encoder` and `mask_decoder` are right, but `Sam.forward` is not:
    its pre- and postprocessing pad to a square.

    Raises:
        ImportError: the reference package is not installed.
    """
    torch = import_torch()
    import_segment_anything()
    # By name, not as an attribute: after a first import that failed half-way (torchvision without
    # its operators), Python does not bind the submodules to the package again.
    modeling = importlib.import_module("segment_anything.modeling")
    vit = config.image_encoder
    width = vit.out_channels
    encoder = modeling.ImageEncoderViT(
        img_size=max(vit.image_size),
        patch_size=vit.patch_size,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.heads,
        mlp_ratio=vit.mlp_ratio,
        out_chans=width,
        qkv_bias=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=vit.window,
        global_attn_indexes=vit.global_blocks,
    )
    if vit.image_size[0] != vit.image_size[1]:
        _make_rectangular(torch, encoder, vit.grid, vit.width, vit.heads)
    sam = modeling.Sam(
        image_encoder=encoder,
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=width,
            image_embedding_size=vit.grid,
            input_image_size=vit.image_size,
            mask_in_chans=config.mask_channels,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=config.num_multimask,
            transformer=modeling.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=width,
                mlp_dim=config.decoder_mlp_width,
                num_heads=config.decoder_heads,
            ),
            transformer_dim=width,
            iou_head_depth=config.iou_head_depth,
            iou_head_hidden_dim=config.iou_head_width,
        ),
        pixel_mean=list(config.pixel_mean),
        pixel_std=list(config.pixel_std),
    )
    return sam.eval()


def build_reference_sam2(config: Sam2Config) -> Any:
    """Upstream's `SAM2VideoPredictor` for any of our square configs, random weights, eval, float32.

    As upstream's `build_sam2_video_predictor` makes it, with the dynamic choice of masks by
    stability and certain masks on prompted frames, but without filling holes, which upstream does
    on CUDA only. Its `SAM2ImagePredictor` takes this model as well.

    Raises:
        ImportError: the reference package is not installed.
        ValueError: the config's frame is no square, which upstream cannot build.
    """
    import_sam2()
    _check_decoder(config)
    height, width = config.image_size
    if height != width:
        raise ValueError(f"upstream's SAM 2 takes square frames only, not {config.image_size}")
    load = importlib.import_module
    memory = load("sam2.modeling.memory_encoder")
    sine = load("sam2.modeling.position_encoding").PositionEmbeddingSine
    channels = config.image_encoder.out_channels
    predictor = load("sam2.sam2_video_predictor").SAM2VideoPredictor(
        image_encoder=_build_hiera(load, config, sine(channels)),
        memory_attention=_build_memory_attention(load, config),
        memory_encoder=memory.MemoryEncoder(
            out_dim=config.memory_width,
            in_dim=channels,
            position_encoding=sine(config.memory_width),
            mask_downsampler=memory.MaskDownSampler(
                embed_dim=channels, kernel_size=3, stride=2, padding=1
            ),
            fuser=memory.Fuser(memory.CXBlock(channels), num_layers=2),
        ),
        num_maskmem=config.num_memories,
        max_obj_ptrs_in_encoder=config.num_pointers,
        image_size=height,
        no_obj_embed_spatial=config.occlusion_embedding,
        add_tpos_enc_to_obj_ptrs=config.pointer_times,
        proj_tpos_enc_in_obj_ptrs=config.pointer_times,
        use_signed_tpos_enc_to_obj_ptrs=config.pointer_times,
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
        binarize_mask_from_pts_for_mem_enc=True,
        **_SAM2_OPTIONS,
    )
    return predictor.eval()


_SAM2_OPTIONS: dict[str, Any] = {
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "use_mask_input_as_output_without_sam": True,
    "directly_add_no_mem_embed": True,
    "use_high_res_features_in_sam": True,
    "multimask_output_in_sam": True,
    "iou_prediction_use_sigmoid": True,
    "use_obj_ptrs_in_encoder": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "pred_obj_scores": True,
    "pred_obj_scores_mlp": True,
    "fixed_no_obj_ptr": True,
    "multimask_output_for_tracking": True,
    "use_multimask_token_for_obj_ptr": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
    "use_mlp_for_obj_ptr_proj": True,
}
"""What all of upstream's configurations have in common (`sam2/configs`)."""


def _build_hiera(load: Any, config: Sam2Config, positions: Any) -> Any:
    hiera, encoder = config.image_encoder, load("sam2.modeling.backbones.image_encoder")
    trunk = load("sam2.modeling.backbones.hieradet").Hiera(
        embed_dim=hiera.width,
        num_heads=hiera.heads,
        stages=hiera.stages,
        global_att_blocks=hiera.global_blocks,
        window_pos_embed_bkg_spatial_size=hiera.position_grid,
        window_spec=hiera.windows,
    )
    neck = encoder.FpnNeck(
        position_encoding=positions,
        d_model=hiera.out_channels,
        backbone_channel_list=list(reversed(hiera.stage_widths)),
        fpn_top_down_levels=list(hiera.top_down_levels),
        fpn_interp_model="nearest",
    )
    return encoder.ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def _build_memory_attention(load: Any, config: Sam2Config) -> Any:
    memory = load("sam2.modeling.memory_attention")
    attention = functools.partial(
        load("sam2.modeling.sam.transformer").RoPEAttention,
        embedding_dim=config.image_encoder.out_channels,
        num_heads=1,
        feat_sizes=config.image_encoder.grid,
    )
    layer = memory.MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=config.memory_mlp_width,
        dropout=0.1,
        pos_enc_at_attn=False,
        self_attention=attention(),
        d_model=config.image_encoder.out_channels,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=attention(rope_k_repeat=True, kv_in_dim=config.memory_width),
    )
    return memory.MemoryAttention(
        d_model=config.image_encoder.out_channels,
        pos_enc_at_input=True,
        layer=layer,
        num_layers=config.memory_depth,
    )


def _check_decoder(config: Sam2Config) -> None:
    """Upstream writes the decoder's sizes into the code; no config can ask for others."""
    fixed = Sam2Config()
    for name in (
        "num_multimask",
        "mask_channels",
        "decoder_depth",
        "decoder_heads",
        "decoder_mlp_width",
        "iou_head_width",
        "iou_head_depth",
    ):
        if getattr(config, name) != getattr(fixed, name):
            raise ValueError(
                f"upstream's SAM 2 has {name} {getattr(fixed, name)}, not {getattr(config, name)}"
            )


def randomise(model: Any, seed: int) -> Any:
    """Jitter every tensor of `model` that is constant after initialisation; in place.

    Position embeddings, relative positions and biases start at zero and norm scales at one, and
    zeros hide mistakes: a transposed or forgotten table changes nothing. Each such tensor gets
    normal noise of standard deviation 0.1 (position tables 0.3, so that they weigh in the
    attention). Returns `model`.
    """
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or tensor.numel() < 1:
                continue
            if (tensor == tensor.flatten()[0]).all() or name.endswith("bias"):
                size = 0.3 if "pos" in name.rsplit(".", 1)[-1] else 0.1
                tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return model


def _make_rectangular(
    torch: Any, encoder: Any, grid: tuple[int, int], width: int, heads: int
) -> None:
    def zeros(*shape: int) -> Any:
        return torch.nn.Parameter(torch.zeros(shape))

    encoder.pos_embed = zeros(1, *grid, width)
    for block in encoder.blocks:
        if block.window_size == 0:
            block.attn.rel_pos_h = zeros(2 * grid[0] - 1, width // heads)
            block.attn.rel_pos_w = zeros(2 * grid[1] - 1, width // heads)


_LIBRARIES: list[Any] = []
"""Operator declarations live as long as the objects that made them."""


def _import_torchvision(torch: Any) -> None:
    if "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'torchvision'")
    if _operators_load(torch, Path(spec.origin).parent):
        return
    # On import torchvision registers shape rules for these two, and fails where they do not exist.
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", functools.partial(_nms, torch), "CPU")
    _LIBRARIES.append(library)
    boxes = importlib.import_module("torchvision.ops.boxes")
    vars(boxes)["_assert_has_ops"] = lambda: None


def _operators_load(torch: Any, folder: Path) -> bool:
    """Whether torchvision's compiled operators fit this PyTorch."""
    for path in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return True
    return False


def _nms(torch: Any, boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """Greedy non-maximum suppression on XYXY boxes (n, 4), as torchvision's CPU kernel.

    Returns the indices kept, best score first. A box goes when its IoU with a kept one is greater
    than (not equal to) the threshold.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = scores.sort(descending=True, stable=True).indices
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        top_left = torch.maximum(boxes[order, :2], boxes[best, :2])
        bottom_right = torch.minimum(boxes[order, 2:], boxes[best, 2:])
        overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
        order = order[~(overlap / (areas[best] + areas[order] - overlap) > iou_threshold)]
    return torch.tensor(kept, dtype=torch.int64)
