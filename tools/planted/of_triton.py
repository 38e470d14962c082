"""Breakages of the Triton kernels, which run under the strict interpreter."""

from .breakage import in_folder

KERNELS, BACKWARD, NOISE = "test_kernels", "test_backward", "test_noise"
LAYER, MIXER, RELATIVES = "test_relatives_patchtsmixer_layer", "test_relatives_patchtsmixer", "test_relatives"
BELOW = "test_matches_eager and below and not cuda"
GRADIENTS = "test_matches_eager and below and float32-fast and not cuda"

BREAKAGES = in_folder("mixer_kernels/backends/triton", {
    "mask one too far": (
        "token_mixing.py", "mask_s = offs_s < S", "mask_s = offs_s < S + 1", KERNELS,
        "test_matches_eager and one and not cuda"),
    "store past the last channel": (
        "channel_products.py", "mask = mask_m[:, None] & mask_n[None, :]",
        "mask = mask_m[:, None] & (mask_n | True)[None, :]", KERNELS, BELOW),
    "masked lanes without other": (
        "channel_products.py", "mask=mask_k[None, :], other=0.0", "mask=mask_k[None, :]", KERNELS, BELOW),
    "rows past the hidden units": (
        "token_products.py", "mask_k = rows < K", "mask_k = rows <= K", KERNELS,
        "test_matches_eager and beyond and not cuda"),
    "b1 dropped": ("token_mixing.py", "ACT(z + tl.load(b1_ptr + offs_d)[None, :])", "ACT(z)", KERNELS, BELOW),
    "b2 dropped": ("token_mixing.py", " + tl.load(b2_ptr + offs_s)[:, None]", "", KERNELS, BELOW),
    "residual dropped": ("channel_epilogue.py", "return u.to(tl.float32) + acc", "return acc", KERNELS, BELOW),
    "eps dropped": ("row_statistics.py", "m2 / C + eps", "m2 / C", KERNELS, "test_eps and not cuda"),
    "the first norm's eps twice": (
        "__init__.py", "norm = Norm(*row_statistics(u, eps2), channels",
        "norm = Norm(*row_statistics(u, options.eps), channels", KERNELS, "test_two_eps and not cuda"),
    "a token's stride for a channel's": (
        "row_statistics.py", "(c0 + offs_c)[None, :] * stride_c", "(c0 + offs_c)[None, :] * (stride_s // S)", KERNELS,
        "test_layouts and transposed and 49 and float32 and not cuda"),
    "chunks merged without their distance": (
        "row_statistics.py", "m2 += chunk_m2 + delta * delta * (seen * count / (seen + count))", "m2 += chunk_m2",
        KERNELS, "test_layouts and transposed and not cuda"),
    "sum of the unrounded weight": (
        "pack.py", "sums += folded.to(tl.float32)", "sums += w", KERNELS,
        "test_mean_far_from_zero and 30 and not cuda"),
    "scale of the folded rows dropped": (
        "channel_epilogue.py", "z *= tl.load(scale_ptr", "z += 0 * tl.load(scale_ptr", KERNELS,
        "test_small_gamma and not cuda"),
    "a coefficient's sign": ("gelu.py", "(-3.6027187e-4", "(3.6027187e-4", "test_gelu", "fit"),
    "one column block for all": (
        "channel_descriptors.py", "first = n0 + i * SUB_N", "first = n0", KERNELS, "test_tensor_descriptors"),
    "TF32 always": ("../arguments.py", 'else "ieee"', 'else "tf32"', KERNELS, BELOW),
    "32-bit image offset": (
        "token_mixing.py", "image = (tl.program_id(0) // c_tiles).to(tl.int64)", "image = tl.program_id(0) // c_tiles",
        "test_launches", "test_offsets and image"),
    "32-bit rows": (
        "channel_products.py", "INT64=needs_int64(u.shape[1:], u.stride()[1:]) or rows + config.block_m >= 2**31",
        "INT64=False", "test_launches", "test_more_rows_than_int32_holds or test_offsets"),
    "slope forgotten": (
        "token_data_gradient.py", "dz = (da * slope).to(DTYPE)", "dz = da.to(DTYPE)", BACKWARD, GRADIENTS),
    "one term of LayerNorm backward dropped": (
        "norm_backward.py", " - xhat * mean_dxhat_xhat[:, None]", "", BACKWARD, GRADIENTS),
    "the residual's gradient dropped": (
        "norm_backward.py", "            dx += dy\n", "            pass\n", BACKWARD, GRADIENTS),
    "two programs on one partial sum": (
        "token_weight_gradients.py", "partial_ptr += split * M * N", "partial_ptr += 0 * split", BACKWARD,
        GRADIENTS),
    "a step past the last channels": (
        "token_weight_gradients.py", "is_last = c0 >= C", "is_last = c0 > C + BLOCK_C", BACKWARD,
        "many_turns and sm_80-torch.float32"),
    "the next image's rows": (
        "token_weight_gradient_descriptors.py", "row_n += tl.where(is_last, N, 0)", "row_n += 0", BACKWARD,
        "many_turns and sm_90"),
    "partial sums of the first rows only": (
        "partial_sums.py", "for r0 in range(0, rows, ROWS)", "for r0 in range(0, rows - ROWS, ROWS)", BACKWARD,
        GRADIENTS),
    "column sums of one row tile only": (
        "channel_backward.py", "sums_ptr + (m0 // BLOCK_M) * D_C + offs_n", "sums_ptr + offs_n", BACKWARD,
        "test_matches_eager and 32 and float32-fast and not cuda"),
    "another mask backward": (
        "token_data_gradient.py", "kept_hidden(noise, offs_d[None, :], offs_c[:, None], image)",
        "kept_hidden(noise, offs_d[None, :] + 1, offs_c[:, None], image)", NOISE, "gradients_see and fused"),
    "the same noise in every image": (
        "noise.py", "0 * image, 0 * image, image, p", "0 * image, 0 * image, 0 * image, p", NOISE,
        "test_stochastic_depth and triton and sm_80"),
    "one noise for hidden units and branch": (
        "noise.py", "SITE_BRANCH = tl.constexpr(1)", "SITE_BRANCH = tl.constexpr(0)", NOISE, "test_all_kernels_draw"),
    "kept values not scaled": (
        "noise.py", "return 1.0 / (1.0 - p) if p < 1.0", "return 1.0 if p < 1.0", NOISE,
        "test_what_is_kept and triton"),
    "one seed for both mixers of a layer": (
        "gated_mixer_layer.py", "with_next_seed(noise) if DROPOUT else noise", "noise", LAYER,
        "test_dropout_is_that_of_two_mixers"),
    "the layer's first residual dropped": (
        "gated_mixer_layer.py", "u = x + tl.trans(v)", "u = tl.trans(v)", LAYER, "test_matches_eager and small"),
    "the layer's first eps twice": (
        "gated_mixer_layer.py", "eps_of(options.eps, options), eps_of(eps2, options)",
        "eps_of(options.eps, options), eps_of(options.eps, options)", LAYER, "test_matches_eager and small"),
    "the gate without its bias": (
        "gated_mixing.py", "logits += tl.load(b_ptr + offs_k)[None, :]", "logits += 0.0", MIXER,
        "test_matches_eager and features"),
    "softmax over the padding too": (
        "gated_mixing.py", 'logits = tl.where((offs_k < extent)[None, :], logits, float("-inf"))', "logits = logits",
        MIXER, "test_matches_eager and features"),
    "softmax where a sigmoid is asked for": (
        "gated_mixing.py", 'SIGMOID=options.gate == "sigmoid"', "SIGMOID=False", MIXER,
        "test_sigmoid_gate and features"),
    "the sigmoid's slope without one factor": (
        "gated_mixing_backward.py", "dlogits = gate * (1.0 - gate) * dgate", "dlogits = gate * dgate", MIXER,
        "test_sigmoid_gate and features"),
    "one term of the softmax's gradient": (
        "gated_mixing_backward.py", "(dgate - tl.sum(dgate * gate, 1, keep_dims=True))", "dgate", MIXER,
        "test_matches_eager and features"),
    "the gate after fc2 where it is before fc1": (
        "gated_mixing.py", "GATE_FIRST=gate_first", "GATE_FIRST=False", MIXER, "test_matches_eager and channels"),
    "the second product of the wrong half": (
        "token_linear.py", "out = outer * v", "out = outer + v", RELATIVES, "test_matches_eager and spatial"),
    "values and gates exchanged": (
        "activation.py", "return value * gate / (1.0 + tl.exp2(-1.4426950408889634 * gate))",
        "return value * gate / (1.0 + tl.exp2(-1.4426950408889634 * value))", RELATIVES,
        "test_matches_eager and gmixer and below"),
    "NaN swallowed by ReLU": (
        "activation.py", "return tl.where(z <= 0, 0.0, z)  # NaN stays", "return tl.where(z > 0, z, 0.0)",
        "test_activations", "nan_stays and relu"),
    "rows of the next matrix": (
        "pack.py", "block = tl.program_id(0) - first", "block = tl.program_id(0) - first + 1", KERNELS, BELOW),
    "packs kept for ever": (
        "pack.py", "self.made: dict[str, Tensor] = {}\n        self._kept = kept or {}",
        "self.made = self._kept = globals().setdefault('_for_ever', {})", "test_weights_are_never_stale",
        "data_copy and triton and Mixer"),
    "one name for a weight folded and as it is": (
        "pack.py", 'f"{name}.folded"', 'f"{name}.w"', "test_freeze", "test_our_own_block and autocast"),
    "a frozen block's packs ignored": (
        "pack.py", "self._kept = kept or {}", "self._kept = {}", "test_freeze",
        "test_a_frozen_model_launches_no_packing and mixer"),
})  # fmt: skip
