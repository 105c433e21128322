"""`SAM2VideoPredictor`: prompts on any frame of a clip, tracked through all others.

Upstream: facebookresearch/sam2@2b90b9f, `sam2/sam2_video_predictor.py` (one memory per object).

Differs from upstream: arrays in and out are NumPy's; frames are decoded when they are needed; all
objects of a frame are tracked in one call, which is compiled once for a clip; holes are filled on
every machine; prompts that make no sense are errors, and leave the state as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from samjax.frame import stretch_video
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam2 import NO_OBJECT_LOGIT, ImageFeatures, ObjectPrediction
from samjax.models.sam2_config import Sam2Config
from samjax.predictor.components import clean
from samjax.predictor.model import SamModel, check_family
from samjax.predictor.prompts import pad_slots
from samjax.video import steps
from samjax.video.frames import open_frames
from samjax.video.memory import ObjectTrack, Record
from samjax.video.state import ClipState, check_frame, check_points

LIMIT = 32.0  # of earlier logits that refine a prompt
HOLE_LOGIT = 0.1  # what the pixels of a filled hole get
CACHED_FRAMES = 4  # whose features are kept for the next prompt

Output = tuple[int, list[Any], np.ndarray]


class SAM2VideoPredictor:
    """Tracks objects through a clip from prompts on any of its frames, as upstream's class."""

    def __init__(
        self,
        sam_model: SamModel,
        fill_hole_area: int = 8,
        non_overlap_masks: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        max_cond_frames_in_attn: int = -1,
        *,
        dtype: DTypeLike = jnp.float32,
    ):
        """Upstream's options; `fill_hole_area` as upstream's builder sets it.

        Args:
            sam_model: a SAM 2 model.
            fill_hole_area: holes of up to this many pixels of the low-res mask are filled; 0: none.
            non_overlap_masks: leave each pixel to the object with the highest logit.
            add_all_frames_to_correct_as_cond: let frames that are corrected after tracking be
                conditioning frames, which are remembered for good.
            max_cond_frames_in_attn: attend to so many conditioning frames at most, the closest;
                at least 2, or -1 for all.
            dtype: of the computation, float32 or bfloat16; results are float32.

        Raises:
            ValueError: a SAM v1 model, or options out of range.
        """
        if max_cond_frames_in_attn != -1 and max_cond_frames_in_attn < 2:
            raise ValueError(
                f"max_cond_frames_in_attn {max_cond_frames_in_attn}: expected -1 or at least 2"
            )
        if fill_hole_area < 0:
            raise ValueError(f"fill_hole_area {fill_hole_area}: expected at least 0")
        self.model = sam_model
        self.config = check_family(sam_model, Sam2Config, "SamPredictor")
        self.fill_hole_area = fill_hole_area
        self.non_overlap_masks = non_overlap_masks
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond
        self.max_cond_frames_in_attn = max_cond_frames_in_attn
        self._static = {"config": self.config, "dtype": jnp.dtype(dtype)}

    def init_state(
        self,
        video_path: Any,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
    ) -> ClipState:
        """Opens a clip.

        Args:
            video_path: what `samjax.video.frames.open_frames` takes: a folder of images named by
                their frame numbers, a video file, or an array uint8 (t, h, w, 3).
            offload_state_to_cpu: keep the memories in the host's memory, not on the device.
            offload_video_to_cpu, async_loading_frames: taken for upstream's sake; frames are
                always decoded one by one, and never kept on the device.

        Raises:
            ValueError, OSError: no clip, or an empty one; the message names it.
        """
        frames = open_frames(video_path)
        height, width = frames.size
        return ClipState(frames, len(frames), height, width, offload_state_to_cpu)

    def add_new_points_or_box(
        self,
        inference_state: ClipState,
        frame_idx: int,
        obj_id: Any,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
        box: ArrayLike | None = None,
    ) -> Output:
        """Prompts an object on a frame, and returns what the frame then looks like.

        On a frame that was not tracked yet the prompt starts from nothing; on one that was, it
        corrects the result.

        Args:
            inference_state: the clip.
            frame_idx: the frame.
            obj_id: the object, an old or a new one.
            points: (p, 2), (x, y) in pixels of the video.
            labels: (p,): 1 foreground, 0 background.
            clear_old_points: False adds the points to those of this frame.
            normalize_coords: False for coordinates in fractions of the video's size, [0, 1].
            box: (4,) XYXY in pixels of the video; only with `clear_old_points`.

        Returns:
            The frame, the ids of all objects, and their logits float32 (n, 1, h, w) at the
            video's size; -1024 for an object without a result on the frame.

        Raises:
            ValueError: a frame that the clip does not have, no prompt, or one that makes no sense.
        """
        state = inference_state
        frame = check_frame(state, frame_idx)
        coords, kinds = check_points(
            state, self.config, points, labels, box, normalize=normalize_coords
        )
        if box is not None and not clear_old_points:
            raise ValueError("a box starts a prompt: it cannot be added to points of before")
        known = state.tracks.get(obj_id, ObjectTrack())
        if not clear_old_points and frame in known.points:
            old_coords, old_kinds = known.points[frame]
            coords = np.concatenate([old_coords, coords])
            kinds = np.concatenate([old_kinds, kinds])
        conditioning = self._is_conditioning(known, frame)
        earlier = known.latest(frame, conditioning=conditioning)
        record = self._run_prompt(state, known, frame, coords, kinds, earlier)
        self._keep(state, obj_id, known, frame, record, conditioning)
        known.points[frame] = coords, kinds
        known.masks.pop(frame, None)
        return self._show(state, frame, conditioning)

    add_new_points = add_new_points_or_box

    def add_new_mask(
        self, inference_state: ClipState, frame_idx: int, obj_id: Any, mask: ArrayLike
    ) -> Output:
        """Gives an object's mask on a frame; takes the place of points there.

        Args:
            inference_state: the clip.
            frame_idx: the frame.
            obj_id: the object, an old or a new one.
            mask: bool, or numbers of which 0 is background, (h, w) of any size.

        Returns, and raises: see `add_new_points_or_box`.
        """
        state = inference_state
        frame = check_frame(state, frame_idx)
        given = np.asarray(mask)
        if given.ndim != 2 or not given.size or given.dtype.kind not in "buif":
            raise ValueError(f"mask: expected (h, w), got {given.dtype} of shape {given.shape}")
        if given.dtype.kind == "f" and not np.isfinite(given).all():
            raise ValueError("mask: holds NaN or infinite values")
        size = self.config.image_size
        fitted = (given != 0).astype(np.float32)
        if given.shape != size:
            fitted = np.asarray(steps.mask_to_frame(fitted, size=size), np.float32)
        known = state.tracks.get(obj_id, ObjectTrack())
        conditioning = self._is_conditioning(known, frame)
        prediction = steps.prompt_mask(
            self.model.params, self._features(state, frame), fitted, **self._static
        )
        self._keep(state, obj_id, known, frame, self._record(state, prediction), conditioning)
        known.masks[frame] = fitted > 0
        known.points.pop(frame, None)
        return self._show(state, frame, conditioning)

    def propagate_in_video(
        self,
        inference_state: ClipState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[Output]:
        """Tracks all objects frame by frame.

        Args:
            inference_state: the clip.
            start_frame_idx: where to start; by default at the first frame with a prompt.
            max_frame_num_to_track: how many frames after that one; by default all there are.
            reverse: towards the beginning of the clip.

        Yields:
            As `add_new_points_or_box` returns, for each frame. Backwards from frame 0: nothing.

        Raises:
            RuntimeError: an object without prompts.
            ValueError: `start_frame_idx` is not a frame of the clip.
        """
        state = inference_state
        self.propagate_in_video_preflight(state)
        if start_frame_idx is None:
            start = min(t for track in state.tracks.values() for t in track.conditioning)
        else:
            start = check_frame(state, start_frame_idx)
        most = state.num_frames if max_frame_num_to_track is None else max_frame_num_to_track
        if reverse:
            order = range(start, max(start - most, 0) - 1, -1) if start > 0 else range(0)
        else:
            order = range(start, min(start + most, state.num_frames - 1) + 1)
        for frame in order:
            records = self._track_frame(state, frame, reverse)
            for track in state.tracks.values():
                track.direction[frame] = reverse
            yield frame, state.obj_ids, self._at_video_size(state, records)

    def propagate_in_video_preflight(self, inference_state: ClipState) -> None:
        """Makes memories of the prompts since the last propagation.

        Raises:
            RuntimeError: there is no prompt, or none that conditions one of the objects.
        """
        state = inference_state
        if not state.tracks:
            raise RuntimeError("no prompts: call add_new_points_or_box(...) or add_new_mask(...)")
        for obj_id, track in state.tracks.items():
            if not track.conditioning and not track.new_conditioning:
                raise RuntimeError(f"object {obj_id!r} has no prompts; add some, or remove it")
        for track in state.tracks.values():
            for new, kept in (
                (track.new_tracked, track.tracked),
                (track.new_conditioning, track.conditioning),
            ):
                for frame, record in new.items():
                    if record.memory is None:
                        record.memory = self._remember(state, frame, record)
                    kept[frame] = record
                new.clear()
            for frame in track.conditioning:
                track.tracked.pop(frame, None)

    def clear_all_prompts_in_frame(
        self, inference_state: ClipState, frame_idx: int, obj_id: Any, need_output: bool = True
    ) -> Output | None:
        """Takes back an object's prompts on a frame; its result there counts as tracked then.

        Raises:
            ValueError: no such frame or object.
        """
        state = inference_state
        frame = check_frame(state, frame_idx)
        track = state.tracks.get(obj_id)
        if track is None:
            raise ValueError(f"no object {obj_id!r}; there are {state.obj_ids}")
        for records in (track.points, track.masks, track.new_conditioning, track.new_tracked):
            records.pop(frame, None)
        if (record := track.conditioning.pop(frame, None)) is not None:
            track.tracked[frame] = record
            track.direction.pop(frame, None)
        return self._show(state, frame, self._any_new(state, frame)) if need_output else None

    def remove_object(
        self,
        inference_state: ClipState,
        obj_id: Any,
        strict: bool = False,
        need_output: bool = True,
    ) -> tuple[list[Any], list[tuple[int, np.ndarray]]]:
        """Forgets an object.

        Returns:
            The ids that remain, and with `need_output` the frames that the object had prompts on
            with the others' logits.

        Raises:
            RuntimeError: no such object, if `strict`.
        """
        state = inference_state
        track = state.tracks.get(obj_id)
        if track is None:
            if strict:
                raise RuntimeError(f"no object {obj_id!r}; there are {state.obj_ids}")
            return state.obj_ids, []
        prompted = sorted({*track.points, *track.masks})
        del state.tracks[obj_id]
        if not need_output or not state.tracks:
            return state.obj_ids, []
        shown = [self._show(state, frame, self._any_new(state, frame)) for frame in prompted]
        return state.obj_ids, [(frame, logits) for frame, _, logits in shown]

    def reset_state(self, inference_state: ClipState) -> None:
        """Forgets all objects; the clip stays open."""
        inference_state.tracks.clear()

    def _track_frame(self, state: ClipState, frame: int, reverse: bool) -> list[Record]:
        """Each object's result: the one of its prompts where the frame conditions it."""
        tracks = list(state.tracks.values())
        if not all(frame in track.conditioning for track in tracks):
            # All objects, so that one program serves whichever of them are conditioned here.
            bank = self._bank(state, tracks, frame, reverse)
            features = self._features(state, frame)
            results = steps.track(self.model.params, features, bank, **self._static)
            for track, (logits, score, pointer, memory) in zip(tracks, results, strict=True):
                if frame not in track.conditioning:
                    record = Record(self._fill(logits), score, pointer, memory)
                    track.tracked[frame] = self._store(state, record)
        return [track.conditioning.get(frame) or track.tracked[frame] for track in tracks]

    def _run_prompt(
        self,
        state: ClipState,
        track: ObjectTrack,
        frame: int,
        coords: np.ndarray,
        labels: np.ndarray,
        earlier: Record | None,
    ) -> Record:
        bank = None
        if frame in track.direction:
            bank = self._bank(state, [track], frame, track.direction[frame])
        mask_logits = None
        if earlier is not None:
            mask_logits = np.clip(earlier.low_res_logits, -LIMIT, LIMIT)[None, ..., None]
        merged = merge_prompts(coords[None], labels[None], None, box_first=True)
        prediction = steps.prompt(
            self.model.params,
            self._features(state, frame),
            bank,
            *pad_slots(*merged),
            mask_logits,
            np.array([len(labels) <= 1]),
            **self._static,
        )
        return self._record(state, prediction)

    def _bank(self, state: ClipState, tracks: list[ObjectTrack], frame: int, reverse: bool) -> dict:
        most, count = self.max_cond_frames_in_attn, state.num_frames
        return steps.bank_of(self.config, tracks, frame, count, reverse=reverse, most=most)

    def _remember(self, state: ClipState, frame: int, record: Record) -> Any:
        memory = steps.remember(
            self.model.params,
            self._features(state, frame),
            record.low_res_logits,
            record.object_score_logits,
            **self._static,
        )
        return np.asarray(memory) if state.offload else memory

    def _features(self, state: ClipState, frame: int) -> ImageFeatures:
        if frame in state.features:
            return state.features[frame]
        pixels = stretch_video(state.frames[frame], self.config.image_size)
        features = steps.encode(self.model.params, pixels, **self._static)
        while len(state.features) >= CACHED_FRAMES:
            state.features.pop(next(iter(state.features)))
        state.features[frame] = features
        return features

    def _record(self, state: ClipState, prediction: ObjectPrediction) -> Record:
        logits, _, score, pointer = (x[0] for x in prediction)
        return self._store(state, Record(self._fill(logits), score, jnp.asarray(pointer, "f")))

    def _fill(self, logits: Any) -> Any:
        if not self.fill_hole_area:
            return logits
        return clean(np.asarray(logits), max_hole_area=self.fill_hole_area, margin=HOLE_LOGIT)

    def _store(self, state: ClipState, record: Record) -> Record:
        if not state.offload:
            return record
        kept = {name: value for name, value in vars(record).items() if value is not None}
        return Record(**jax.device_get(kept))

    def _is_conditioning(self, track: ObjectTrack, frame: int) -> bool:
        return frame not in track.direction or self.add_all_frames_to_correct_as_cond

    def _keep(
        self,
        state: ClipState,
        obj_id: Any,
        track: ObjectTrack,
        frame: int,
        record: Record,
        conditioning: bool,
    ) -> None:
        state.tracks[obj_id] = track
        (track.new_conditioning if conditioning else track.new_tracked)[frame] = record

    def _any_new(self, state: ClipState, frame: int) -> bool:
        return any(frame in track.new_conditioning for track in state.tracks.values())

    def _show(self, state: ClipState, frame: int, conditioning: bool) -> Output:
        latest = [track.latest(frame, conditioning=conditioning) for track in state.tracks.values()]
        return frame, state.obj_ids, self._at_video_size(state, latest)

    def _at_video_size(self, state: ClipState, records: Sequence[Record | None]) -> np.ndarray:
        size = state.video_height, state.video_width
        if not records:
            return np.zeros((0, 1, *size), np.float32)
        nothing = np.full(self.config.low_res_size, NO_OBJECT_LOGIT, np.float32)
        logits = [nothing if record is None else record.low_res_logits for record in records]
        return np.asarray(steps.to_video_size(logits, size=size, apart=self.non_overlap_masks))
