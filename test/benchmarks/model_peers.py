"""What a model of this package is measured against: the same arithmetic, written with transformers and plain torch.

Plain modules in a row, without masks, registries or caches. Sizes come from the same configuration; weights are random.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vla_core.model.inputs import ModelInputs
from vla_core.model.vlm.language_model import LANGUAGE_MODELS
from vla_core.model.vlm.pretrained import DTYPES
from vla_core.model.vlm.vision_encoder import CLIP, IMAGENET, SIGLIP, VISION_MODELS

PIXELS = {"siglip": SIGLIP, "clip": CLIP, "dinov2": IMAGENET}


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), act()]
    return nn.Sequential(*layers[:-1])


def normed_mlp(*widths: int) -> nn.Sequential:
    """PointNet's shared layers."""
    return nn.Sequential(
        *(part for a, b in pairwise(widths)
          for part in (nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()))
    )  # fmt: skip


class Vision(nn.Module):
    """Pictures (M, 3, H, W) in [0, 1] through a transformers model to patch tokens (M, N, D)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.options: dict[str, Any] = {}
        self.skip = 0
        if config.type == "mobilenet_v2":
            mean, std = IMAGENET
            self.model = transformers.MobileNetV2Model(
                transformers.MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5), add_pooling_layer=False
            )
            self.output_dim = 1280
        else:
            self.dtype = DTYPES[config.dtype]
            data = {**VISION_MODELS[config.model_name][1], **config.architecture}
            mean, std = next(v for k, v in PIXELS.items() if data["model_type"].startswith(k))
            record = transformers.AutoConfig.for_model(**data)
            if data["model_type"].startswith("siglip"):
                record.vision_use_head = False
            else:
                self.skip = 1
            self.model = transformers.AutoModel.from_config(record, dtype=self.dtype)
            self.output_dim = record.hidden_size
            if config.size != (record.image_size, record.image_size) and self.skip == 0:
                self.options = {"interpolate_pos_encoding": True}
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        if config.freeze:
            self.requires_grad_(False)
        self.frozen = config.freeze

    def train(self, mode: bool = True) -> Vision:
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.model(((images - self.mean) / self.std).to(self.dtype), **self.options).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, self.skip :]


class TinyVision(nn.Module):
    """Convolutions of stride 2, a projection and a norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.output_dim = config.output_dim
        layers: list[nn.Module] = []
        widths = (3, *config.channels)
        for i, (a, b) in enumerate(pairwise(widths)):
            kernel = 3 if i else 5
            layers += [nn.Conv2d(a, b, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.project = nn.Sequential(nn.Linear(widths[-1], config.output_dim), nn.LayerNorm(config.output_dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.project(self.convolutions(images).flatten(2).transpose(1, 2))


class Pool(nn.Module):
    """Learned queries attend to the tokens through ``nn.MultiheadAttention``, ``layers`` times with an MLP or once."""

    def __init__(self, width_in: int, width: int, queries: int, heads: int, layers: int = 0) -> None:
        super().__init__()
        self.keys = nn.Sequential(nn.Linear(width_in, width), nn.LayerNorm(width))
        self.queries = nn.Parameter(0.02 * torch.randn(1, queries, width))
        self.looks = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(max(1, layers)))
        self.thinks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, nn.GELU(), batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if layers else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        keys = self.keys(tokens)
        x = self.queries.expand(len(tokens), -1, -1)
        if not self.thinks:
            return self.looks[0](x, keys, keys, need_weights=False)[0]
        for look, norm, think in zip(self.looks, self.norms, self.thinks, strict=True):
            x = think(x + look(norm(x), keys, keys, need_weights=False)[0])
        return self.norm(x)


def projector(config: Any, width_in: int, width: int) -> nn.Module:
    """The projector of a configuration."""
    if config.type == "mlp":
        return mlp(width_in, config.hidden_dim or width, width, act=nn.GELU)
    if config.type == "perceiver":
        return Pool(width_in, width, config.num_latents, config.num_heads, config.num_layers)
    return Pool(width_in, width, config.num_queries, config.num_heads)


class Language(nn.Module):
    """A transformers decoder, given embeddings; peft's adapters where the configuration has them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dtype = DTYPES[config.dtype]
        record = transformers.AutoConfig.for_model(**{**LANGUAGE_MODELS[config.model_name].architecture,
                                                      **config.architecture})  # fmt: skip
        if config.layers:
            record.num_hidden_layers = config.layers
            if getattr(record, "layer_types", None):
                record.layer_types = record.layer_types[: config.layers]
        self.width = record.hidden_size
        self.model = transformers.AutoModel.from_config(record, dtype=self.dtype)
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if config.lora is not None:
            import peft

            names = {name.split(".")[-1] for name, part in self.model.named_modules() if isinstance(part, nn.Linear)}
            options = peft.LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, target_modules=sorted(names))
            peft.inject_adapter_in_model(options, self.model)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.model(inputs_embeds=embedded.to(self.dtype), use_cache=False).last_hidden_state


class TinyLanguage(nn.Module):
    """An embedding, a GRU and a norm."""

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        self.width = config.d_model
        self.dtype = torch.float32
        self.embed = nn.Embedding(vocab_size, self.width)
        self.gru = nn.GRU(self.width, self.width, batch_first=True)
        self.norm = nn.LayerNorm(self.width)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.norm(self.gru(embedded)[0])


def sines(t: Tensor, dim: int) -> Tensor:
    """An embedding of times (B,)."""
    angles = t[:, None] * torch.exp(torch.linspace(math.log(2 * math.pi / 4), math.log(2 * math.pi / 4e-3), dim // 2,
                                                   device=t.device))  # fmt: skip
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Flow(nn.Module):
    """Flow matching with ``nn.TransformerDecoder``, or with an MLP on the mean token."""

    def __init__(self, config: Any, horizon: int, action_dim: int, context_dim: int) -> None:
        super().__init__()
        self.steps, self.time_dim, self.shape = config.inference_steps, config.time_dim, (horizon, action_dim)
        self.decoder: nn.TransformerDecoder | None = None
        width = config.hidden_dim
        if config.denoiser == "transformer":
            self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
            self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
            self.step, self.time = nn.Linear(action_dim, width), mlp(config.time_dim, width, width, act=nn.SiLU)
            layer = nn.TransformerDecoderLayer(
                width, config.heads, 4 * width, 0.0, nn.GELU(), batch_first=True, norm_first=True
            )
            self.decoder = nn.TransformerDecoder(layer, config.layers, nn.LayerNorm(width))
            self.out = nn.Linear(width, action_dim)
        else:
            chunk = horizon * action_dim
            self.net = mlp(chunk + config.time_dim + context_dim, *[width] * config.layers, chunk)

    def remember(self, context: Tensor) -> Tensor:
        context = context.float()
        return context.mean(dim=1) if self.decoder is None else self.context(context)

    def velocity(self, x: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        time = sines(t, self.time_dim)
        if self.decoder is None:
            return self.net(torch.cat([x.flatten(1), time, memory], dim=-1)).view_as(x)
        return self.out(self.decoder(self.step(x) + self.position + self.time(time)[:, None], memory))

    def loss(self, context: Tensor, actions: Tensor) -> Tensor:
        noise, t = torch.randn_like(actions), torch.rand(len(actions), device=actions.device)
        share = t[:, None, None]
        velocity = self.velocity(share * noise + (1 - share) * actions, t, self.remember(context))
        return (velocity - (noise - actions)).square().mean()

    def predict(self, context: Tensor) -> Tensor:
        memory = self.remember(context)
        x = torch.randn(len(context), *self.shape, device=context.device)
        for k in range(self.steps, 0, -1):
            x = x - self.velocity(x, x.new_full((len(x),), k / self.steps), memory) / self.steps
        return x


class PlainVLA(nn.Module):
    """All of these in a row, for a configuration of ``VLAModel``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.language = (
            TinyLanguage(config.language, config.vocab_size) if config.language.type == "tiny_gru"
            else Language(config.language)
        )  # fmt: skip
        self.vision: Any = TinyVision(config.vision) if config.vision.type == "tiny_cnn" else Vision(config.vision)
        width = self.width = self.language.width
        self.projector = projector(config.projector, self.vision.output_dim, width)
        self.camera = nn.Parameter(0.02 * torch.randn(len(config.cameras), 1, width))
        self.state = nn.Sequential(mlp(config.state_dim, 64, width), nn.LayerNorm(width))
        self.readout = nn.Parameter(0.02 * torch.randn(1, config.readout_tokens, width))
        self.head = Flow(config.head, config.horizon, config.action_dim, width)

    def see(self, inputs: ModelInputs) -> Tensor:
        """Vision tokens (B, K N, D) by camera, projected."""
        return self.project(self.look(inputs))

    def look(self, inputs: ModelInputs) -> Tensor:
        images = torch.stack([inputs.images[name] for name in self.config.cameras], dim=1)
        return self.vision(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def project(self, seen: Tensor) -> Tensor:
        tokens = self.projector(seen.flatten(0, 1).float()).unflatten(0, seen.shape[:2])
        return (tokens + self.camera).flatten(1, 2)

    def forward(self, inputs: ModelInputs) -> Tensor:
        readout = self.readout.expand(len(inputs.tokens), -1, -1)
        text = self.language.embed(inputs.tokens).to(self.language.dtype)
        own = [self.see(inputs), self.state(inputs.state)[:, None], readout]
        features = self.language(torch.cat([text, *(part.to(text.dtype) for part in own)], dim=1))
        return features[:, -self.config.readout_tokens :] if self.config.context == "readout" else features

    def loss(self, inputs: ModelInputs, actions: Tensor) -> Tensor:
        return self.head.loss(self(inputs), actions)

    @torch.no_grad()
    def predict(self, inputs: ModelInputs) -> Tensor:
        return self.head.predict(self(inputs))


# --- point clouds and the bird's eye view ---


def sample_farthest(xyz: Tensor, count: int) -> Tensor:
    """Indices (B, count), one farthest point after the other."""
    batch, points, _ = xyz.shape
    chosen = torch.zeros(batch, count, dtype=torch.long, device=xyz.device)
    distance = torch.full((batch, points), 1e10, device=xyz.device)
    farthest = torch.zeros(batch, dtype=torch.long, device=xyz.device)
    rows = torch.arange(batch, device=xyz.device)
    for i in range(count):
        chosen[:, i] = farthest
        center = xyz[rows, farthest][:, None]
        distance = torch.minimum(distance, ((xyz - center) ** 2).sum(dim=-1))
        farthest = distance.argmax(dim=-1)
    return chosen


def in_ball(xyz: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """Indices (B, S, count) of the nearest points; those beyond the radius are replaced by the nearest one."""
    distance, index = torch.cdist(centers, xyz).topk(count, dim=-1, largest=False)
    return torch.where(distance <= radius, index, index[..., :1])


class PointNet(nn.Module):
    """PointNet++ with single-scale grouping, indexing with tensors as its common PyTorch versions do."""

    def __init__(self, config: Any, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self.mlps = nn.ModuleList()
        width = input_dim - 3
        for level in config.levels:
            self.mlps.append(normed_mlp(3 + width, *level.widths))
            width = level.widths[-1]
        self.overall = nn.Sequential(normed_mlp(3 + width, *config.global_widths))
        self.fc = nn.Linear(config.global_widths[-1], config.output_dim)
        self.token = nn.Linear(3 + width, config.output_dim)

    def forward(self, cloud: Tensor) -> Tensor:
        xyz, features = cloud[..., :3], cloud[..., 3:]
        rows = torch.arange(len(cloud), device=cloud.device)[:, None]
        for level, net in zip(self.config.levels, self.mlps, strict=True):
            with torch.no_grad():
                centers = xyz[rows, sample_farthest(xyz, level.points)]
                near = in_ball(xyz, centers, level.radius_m, level.neighbors)
            grouped = torch.cat([(xyz[rows[..., None], near] - centers[:, :, None]) / level.radius_m,
                                 features[rows[..., None], near]], dim=-1)  # fmt: skip
            xyz, features = centers, net(grouped).amax(dim=2)
        described = torch.cat([xyz / self.config.extent_m, features], dim=-1)
        overall = self.fc(self.overall(described).amax(dim=1))[:, None]
        return overall if self.config.output == "global" else torch.cat([overall, self.token(described)], dim=1)


class LiftSplat(nn.Module):
    """The products of every pixel's features and depths, all at once, added to their cells."""

    def __init__(self, config: Any, camera_dim: int) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Conv2d(camera_dim, config.depth_bins + config.width, 1)
        edges = torch.linspace(*config.depth_m, config.depth_bins + 1)
        self.register_buffer("depths", (edges[1:] + edges[:-1]) / 2)

    def forward(self, features: Tensor, intrinsics: Tensor, poses: Tensor, size: tuple[int, int]) -> Tensor:
        batch, cameras, _, height, width = features.shape
        grid, bins = self.config.grid, self.config.depth_bins
        out = self.net(features.flatten(0, 1))
        depth, context = out[:, :bins].softmax(dim=1), out[:, bins:]
        volume = depth[:, None] * context[:, :, None]  # (B K, D, Z, h, w)
        volume = volume.unflatten(0, (batch, cameras)).permute(0, 1, 3, 4, 5, 2).flatten(1, 4)  # (B, K Z h w, D)
        v = (torch.arange(height, device=out.device) + 0.5) * size[0] / height - 0.5
        u = (torch.arange(width, device=out.device) + 0.5) * size[1] / width - 0.5
        z = self.depths[:, None, None].expand(-1, height, width)
        pixels = torch.stack([u.expand_as(z) * z, v[:, None].expand_as(z) * z, z], dim=-1)
        camera_to_ego = poses[..., :3, :3] @ intrinsics.inverse()
        points = torch.einsum("bkij,zhwj->bkzhwi", camera_to_ego, pixels) + poses[:, :, None, None, None, :3, 3]
        return scatter(volume, points.flatten(1, 4), grid, "sum")


def scatter(values: Tensor, places: Tensor, grid: Any, reduce: str) -> Tensor:
    """The map (B, D, X, Y) of ``values`` (B, N, D) at ``places`` (B, N, 3)."""
    batch, width = len(values), values.shape[-1]
    rows, columns = grid.shape
    low = places.new_tensor([grid.x_m[0], grid.y_m[0]])
    cell = ((places[..., :2] - low) / grid.resolution_m).floor().long()
    kept = (cell >= 0).all(dim=-1) & (cell[..., 0] < rows) & (cell[..., 1] < columns)
    if places.shape[-1] == 3:
        kept &= (places[..., 2] >= grid.z_m[0]) & (places[..., 2] < grid.z_m[1])
    sample = torch.arange(batch, device=values.device)[:, None].expand_as(kept)
    index = ((sample * rows + cell[..., 0]) * columns + cell[..., 1])[kept]
    flat = values.new_zeros(batch * rows * columns, width)
    if reduce == "sum":
        flat = flat.index_add(0, index, values[kept])
    else:
        flat = flat.scatter_reduce(0, index[:, None].expand(-1, width), values[kept], "amax", include_self=False)
    return flat.view(batch, rows, columns, width).permute(0, 3, 1, 2)


class Pillars(nn.Module):
    """Points through a shared MLP to the maximum of their cell; offsets from the cell's middle stand for its mean."""

    def __init__(self, config: Any, columns: int, axes: int) -> None:
        super().__init__()
        self.config, self.axes = config, axes
        self.net = normed_mlp(columns + axes, config.width, config.width)

    def forward(self, cloud: Tensor, pose: Tensor) -> Tensor:
        grid = self.config.grid
        xyz = cloud[..., :3] if self.axes == 3 else torch.cat([cloud[..., :2], torch.zeros_like(cloud[..., :1])], -1)
        places = (xyz @ pose[:, :3, :3].mT + pose[:, None, :3, 3])[..., : self.axes]
        offset = (places[..., :2] / grid.resolution_m).frac()
        described = torch.cat([offset, places, places[..., 2:], cloud[..., self.axes :]], dim=-1)
        return scatter(self.net(described), places, grid, "max")


class BEV(nn.Module):
    """The maps of all sources through two convolutions to patches."""

    def __init__(self, config: Any, camera_dim: int, clouds: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.lift_splat = LiftSplat(config, camera_dim)
        self.pillars = nn.ModuleDict({name: Pillars(config, *size) for name, size in clouds.items()})
        layers: list[nn.Module] = []
        for width in ((1 + len(clouds)) * config.width, config.width):
            layers += [nn.Conv2d(width, config.width, 3, padding=1), nn.GroupNorm(1, config.width), nn.ReLU()]
        self.mix = nn.Sequential(*layers)
        self.tokens = nn.Conv2d(config.width, config.output_dim, config.patch, stride=config.patch)

    def forward(self, cameras: tuple[Any, ...], clouds: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        maps = [self.lift_splat(*cameras), *(net(*clouds[name]) for name, net in self.pillars.items())]
        return self.tokens(self.mix(torch.cat(maps, dim=1))).flatten(2).transpose(1, 2)


class PlainDriving(PlainVLA):
    """The preset ``driving``: DINOv2, PointNet++, radars, IMU and the bird's eye view, fused by encoder layers."""

    def __init__(self, config: Any, poses: dict[str, Tensor]) -> None:
        super().__init__(config)
        self.poses = poses
        self.lidar = PointNet(config.sensors["lidar"], len(config.clouds["lidar"]))
        self.radar_names = [name for name in config.sensors if name.startswith("radar")]
        radar, imu = config.sensors[self.radar_names[0]], config.sensors["imu"]
        self.radars = nn.ModuleDict(
            {name: normed_mlp(len(config.clouds[name]), *radar.widths) for name in self.radar_names}
        )
        self.radar_out = nn.ModuleDict(
            {name: nn.Linear(2 * radar.widths[-1], radar.output_dim) for name in self.radar_names}
        )
        self.imu = nn.LSTM(len(config.sequences["imu"]), imu.output_dim, imu.layers, batch_first=True)
        columns = {name: (len(config.clouds[name]), 3 if config.clouds[name][2:3] == ("z",) else 2)
                   for name in config.bev_clouds}  # fmt: skip
        self.bev = BEV(config.bev, self.vision.output_dim, columns)
        widths = {"lidar": config.sensors["lidar"].output_dim, "imu": imu.output_dim, "bev": config.bev.output_dim}
        widths |= dict.fromkeys(self.radar_names, radar.output_dim)
        self.widen = nn.ModuleDict({name: nn.Linear(width, self.width) for name, width in widths.items()})
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(nn.TransformerEncoderLayer(self.width, config.fusion.heads, 4 * self.width, 0.0, nn.GELU(),
                                             batch_first=True, norm_first=True) for _ in range(config.fusion.layers)),
                nn.LayerNorm(self.width),
            )
            for _ in range(2)
        )  # fmt: skip

    def see(self, inputs: ModelInputs) -> Tensor:
        config = self.config
        seen = self.look(inputs)
        parts = {"lidar": self.lidar(inputs.clouds["lidar"].values)}
        for name in self.radar_names:
            points = self.radars[name](inputs.clouds[name].values)
            parts[name] = self.radar_out[name](torch.cat([points.amax(dim=1), points.mean(dim=1)], dim=-1))[:, None]
        parts["imu"] = self.imu(inputs.sequences["imu"].values)[0][:, -1:]
        batch, names = len(inputs.tokens), config.cameras
        size = config.vision.size
        cells = (size[0] // 14, size[1] // 14)
        intrinsics = torch.stack([inputs.intrinsics[name].values for name in names], dim=1)
        poses = torch.stack([self.poses[name].expand(batch, 4, 4) for name in names], dim=1)
        maps = seen.transpose(2, 3).unflatten(3, cells)
        clouds = {name: (inputs.clouds[name].values, self.poses[name].expand(batch, 4, 4))
                  for name in config.bev_clouds}  # fmt: skip
        parts["bev"] = self.bev((maps, intrinsics, poses, size), clouds)
        wide = {name: self.widen[name](part) for name, part in parts.items()}
        scene = self.stages[0](torch.cat([wide.pop(name) for name in config.fusion.scene], dim=1))
        return self.stages[1](torch.cat([scene, self.project(seen), *wide.values()], dim=1))
