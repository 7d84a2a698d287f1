"""Tiny models that hear, with random weights: of transformers, and ONNX ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
SSL = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def clips(count: int = 4, rate: int = RATE, seconds: float = 0.6) -> list[np.ndarray]:
    """Tones in noise, float32 [samples], each of another length, one of them of another's."""
    rng = np.random.default_rng(3)
    made = []
    for n in range(count):
        samples = int(rate * seconds) + 571 * (n % max(2, count - 1))
        time = np.arange(samples) / rate
        tone = np.sin(2 * np.pi * (180 + 90 * n) * time * (1 + 0.3 * time))
        made.append((0.4 * tone + 0.1 * rng.standard_normal(samples)).astype(np.float32))
    return made


def _wav2vec(kind: str, head: str = "Model", **more: object) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        import transformers

        settings: dict[str, Any] = {
            **SSL,
            "conv_dim": (8,) * 7,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            **more,
        }
        config = getattr(transformers, f"{kind}Config")(**settings)
        getattr(transformers, f"{kind}{head}")(config).eval().save_pretrained(folder)
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)

    return save


def _w2v_bert(folder: Path) -> None:
    import transformers

    config = transformers.Wav2Vec2BertConfig(
        **SSL,
        feature_projection_input_dim=160,
        conv_depthwise_kernel_size=7,
        left_max_position_embeddings=8,
    )
    transformers.Wav2Vec2BertModel(config).eval().save_pretrained(folder)
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)


def _dac(folder: Path) -> None:
    import transformers

    config = transformers.DacConfig(
        encoder_hidden_size=8,
        downsampling_ratios=[4, 8, 10],
        decoder_hidden_size=32,
        n_codebooks=3,
        codebook_size=32,
        codebook_dim=4,
        sampling_rate=RATE,
    )
    transformers.DacModel(config).eval().save_pretrained(folder)
    transformers.DacFeatureExtractor(sampling_rate=RATE, hop_length=320).save_pretrained(folder)


def _filled(model: Any, scale: float = 1.0) -> Any:
    """Codebooks that are not all zeros, as theirs are when they are made."""
    import torch

    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith((".embed", ".embed_sum")):
                value.normal_(0, scale)
    return model.eval()


def _encodec(folder: Path) -> None:
    import transformers

    config = transformers.EncodecConfig(
        target_bandwidths=[0.3, 0.9],
        sampling_rate=RATE,
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[8, 5, 4, 2],
        codebook_size=64,
        codebook_dim=16,
        num_lstm_layers=1,
    )
    _filled(transformers.EncodecModel(config), 0.05).save_pretrained(folder)
    transformers.EncodecFeatureExtractor(sampling_rate=RATE).save_pretrained(folder)


def _mimi(folder: Path) -> None:
    import transformers

    config = transformers.MimiConfig(
        sampling_rate=RATE,
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[8, 5, 4, 4],
        codebook_size=64,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        upsample_groups=16,
        sliding_window=16,
    )
    _filled(transformers.MimiModel(config)).save_pretrained(folder)
    transformers.EncodecFeatureExtractor(sampling_rate=RATE).save_pretrained(folder)


def _xcodec(folder: Path) -> None:
    import transformers

    config = transformers.XcodecConfig(
        target_bandwidths=[0.3, 0.9],
        codebook_size=64,
        acoustic_model_config={
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 32,
            "hidden_size": 8,
        },
        semantic_model_config={
            **SSL,
            "conv_dim": (8,) * 7,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
    )
    _filled(transformers.XcodecModel(config)).save_pretrained(folder)
    transformers.DacFeatureExtractor(sampling_rate=RATE, hop_length=320).save_pretrained(folder)


def _xcodec2(folder: Path) -> None:
    import transformers

    config = transformers.Xcodec2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        encoder_hidden_size=4,
        quantization_dim=48,
        quantization_levels=[4, 4, 4],
        semantic_model_config={
            **SSL,
            "feature_projection_input_dim": 160,
            "conv_depthwise_kernel_size": 7,
        },
    )
    model = transformers.Xcodec2Model(config).eval()
    for part in (model.quantizer, model.fc_encoder):
        for weights in part.parameters():
            weights.data.mul_(100)  # else every frame is in the middle
    model.save_pretrained(folder)
    transformers.Xcodec2FeatureExtractor().save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "hubert": _wav2vec("Hubert"),
    "wavlm": _wav2vec("WavLM", do_stable_layer_norm=True, feat_extract_norm="layer"),
    "xlsr": _wav2vec("Wav2Vec2", do_stable_layer_norm=True, feat_extract_norm="layer"),
    "w2v_bert": _w2v_bert,
    "dac": _dac,
    "encodec": _encodec,
    "mimi": _mimi,
    "xcodec": _xcodec,
    "xcodec2": _xcodec2,
    "xvector": _wav2vec(
        "WavLM",
        "ForXVector",
        tdnn_dim=(8, 8, 16),
        tdnn_kernel=(5, 3, 1),
        tdnn_dilation=(1, 2, 1),
        xvector_output_dim=12,
    ),
}


def saved(name: str, folder: Path, seed: int = 0) -> Path:
    """A model and its feature extractor, in `folder`."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        MODELS[name](folder)
    return folder


def onnx_model(
    path: Path, kind: str, codes: int = 0, step: int = 1, seed: int = 0, frames: bool = False
) -> Path:
    """An ONNX file. kind: mel [1, 128, T] and its length, fbank [1, T, 80], wave [1, samples] (in
    blocks of 160). Every `step`-th frame's product with random weights, and where that is largest
    (frames: the products themselves); codes 0: an embedding of 12, the mean of their sizes.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    bins = {"mel": 128, "fbank": 80, "wave": 160}[kind]
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((bins, codes or 12)).astype(np.float32)
    shape = {"mel": [1, 128, "T"], "fbank": [1, "T", 80], "wave": [1, "S"]}[kind]
    inputs = [helper.make_tensor_value_info("feats", TensorProto.FLOAT, shape)]
    values = {"weights": weights, "zero": np.array([0]), "one": np.array([1])}
    values |= {"step": np.array([step]), "blocks": np.array([1, -1, 160])}
    nodes, frame = [], "feats"
    ends = "most"
    values["most"] = np.array([1 << 40])
    if kind == "mel":
        inputs.append(helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]))
        nodes.append(helper.make_node("Transpose", ["feats"], ["turned"], perm=[0, 2, 1]))
        nodes.append(helper.make_node("Cast", ["feats_length"], ["ends"], to=TensorProto.INT64))
        frame, ends = "turned", "ends"
    elif kind == "wave":
        nodes.append(helper.make_node("Reshape", ["feats", "blocks"], ["blocked"]))
        frame = "blocked"
    nodes.append(helper.make_node("Slice", [frame, "zero", ends, "one", "step"], ["some"]))
    nodes.append(helper.make_node("MatMul", ["some", "weights"], ["scores"]))
    if not codes:
        nodes.append(helper.make_node("Abs", ["scores"], ["sizes"]))
        nodes.append(helper.make_node("ReduceMean", ["sizes"], ["out"], axes=[1], keepdims=0))
        out, kept = TensorProto.FLOAT, [1, 12]
    elif frames:
        nodes.append(helper.make_node("Identity", ["scores"], ["out"]))
        out, kept = TensorProto.FLOAT, [1, "N", codes]
    else:
        nodes.append(helper.make_node("ArgMax", ["scores"], ["out"], axis=2, keepdims=0))
        out, kept = TensorProto.INT64, [1, "N"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info("out", out, kept)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
