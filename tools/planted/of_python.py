"""Breakages of what is around the kernels: operators, what blocks keep, adapters, conversions, the CPU backend."""

from .breakage import in_folder

DIRECT, REPEAT, SNAPSHOT, FREEZE = "test_direct", "test_repeat", "test_snapshot", "test_freeze"
BELOW = "test_matches_eager and below and float32-fast and not cuda"
SERIES, CONVERT = "test_patch_time_series", "test_convert"

BREAKAGES = in_folder("mixer_kernels", {
    # calls and operators
    "a weight's address forgotten": (
        "metadata.py", "(t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg())",
        "(0, t.dtype, t.shape, t.stride(), t.is_neg())", REPEAT, "test_a_change_is_seen and python and another"),
    "the backend of a with statement forgotten": (
        "functional/direct.py", "asked = backends.requested_backend() if backend is None else backend",
        "asked = backend", DIRECT, "test_the_backend_that_is_asked_for"),
    "the dtype of autocast forgotten": (
        "functional/direct.py", "return layout, asked, isa, autocast, torch", "return layout, asked, isa, None, torch",
        DIRECT, "test_under_autocast and triton"),
    "the precision of products forgotten": (
        "functional/direct.py", "autocast, torch.get_float32_matmul_precision()", "autocast, None", "test_kernels",
        "tf32"),
    "gradients forgotten": (
        "functional/direct.py", "arguments, needs_grad(x, *parameters), kept", "arguments, False, kept", DIRECT,
        "test_gradients_after_inference and triton"),
    "negative views taken as they lie": (
        "functional/direct.py", "return any([t is not None and (t.is_neg() or t._is_zerotensor()) for t in tensors])",
        "return False", DIRECT, "test_vmap_and_negative_views and triton"),
    "no end to what is remembered": (
        "backends/remembered.py", "if len(_known) >= MOST:", "if False:", DIRECT, "test_there_is_an_end"),
    "a seed for ever": (
        "functional/checks.py", "seed = torch.randint(2**53, (number,), dtype", "seed = torch.zeros((number,), dtype",
        "test_noise", "test_the_generator_decides and triton"),
    "one seed for both mixers": (
        "functional/checks.py", "seed = torch.randint(2**53, (number,), dtype=torch.int64, device=x.device)",
        "seed = torch.randint(2**53, (1,), dtype=torch.int64, device=x.device).repeat(number)",
        "test_relatives_patchtsmixer_layer", "test_dropout_draws_two_seeds or test_dropout_is_that"),
    "another seed backward": (
        "ops/operator.py", "rest = (*ctx.rest[:_SEED], seed, *",
        "rest = (*ctx.rest[:_SEED], None if seed is None else seed + 1, *", "test_noise", "gradients_see and fused"),
    "eps of 0 taken": (
        "functional/checks.py", "if not 0 < value < math.inf:", "if not 0 <= value < math.inf:", "test_functional",
        "test_bad_option"),
    "the fake gradient's strides": (
        "ops/operator.py", "tuple(new_like(t) if want", "tuple(torch.empty_like(t) if want", "test_ops",
        "test_opcheck and float32 and token_mixing_backward"),
    "the first norm's eps in training": (
        "functional/mixer.py", "Half(*both[6:]), options._replace(eps=eps2), name, memory)",
        "Half(*both[6:]), options, name, memory)", "test_properties", "test_what_was_found"),
    "a weight gradient of what was not normalised": (
        "backends/backward.py", "backend.weight_gradient(dz, x, norm, options)",
        "backend.weight_gradient(dz, x, None, options)", "test_backward", BELOW),
    "b4's gradient of the undropped branch": (
        "backends/backward.py", "if want_b4 and (db4 is None or options.noise):", "if want_b4 and db4 is None:",
        "test_noise", "gradients_see and (products or fast or fc) and not cuda"),
    "an absent scale in alpha's gradient": (
        "backends/relatives.py", "dalpha, dbeta = _times(of_vx, scale), _times(of_v, scale)",
        "dalpha, dbeta = of_vx, of_v", "test_relatives", "test_matches_eager and resmlp and below"),
    "the second mixer's eps backward": (
        "backends/relatives.py", "options._replace(seed=seeds[1], eps=eps2)", "options._replace(seed=seeds[1])",
        "test_properties", "test_what_was_found"),
    "the second mixer's seed backward": (
        "backends/relatives.py", "options._replace(seed=seeds[1], eps=eps2)",
        "options._replace(seed=seeds[0], eps=eps2)", "test_relatives_patchtsmixer_layer", "test_dropout_is_that"),
    "cuda first on Hopper": (
        "backends/registry.py", 'first = "cuda" if native else "triton"', 'first = "cuda"', "test_cuda_backend",
        "test_auto_prefers"),
    # what blocks keep
    "a frozen block's packs not passed on": (
        "ops/operator.py", "own = packs_of(backend, packs)", "own = {}", FREEZE, "test_compiles_in_one_graph"),
    "a frozen block's packs not passed on straight": (
        "functional/direct.py", "module.Packing(options.dtype, packs_of(backend, packs)) if packs",
        "module.Packing(options.dtype, {}) if packs", FREEZE, "test_a_frozen_model_launches_no_packing and mixer"),
    "writes to a frozen weight not counted": (
        "freeze.py", "return p.data_ptr(), writes, p.dtype", "return p.data_ptr(), None, p.dtype", FREEZE,
        "test_what_pytorch_counts and step"),
    "a frozen weight's address not looked at": (
        "freeze.py", "return p.data_ptr(), writes, p.dtype", "return None, writes, p.dtype", FREEZE,
        "test_what_pytorch_counts and storage"),
    "a frozen block trains": (
        "freeze.py", 'if getattr(module._parameters.get(leaf), "requires_grad", False):', "if False:", FREEZE,
        "test_training_raises"),
    "packs stay when a block is thawed": (
        "freeze.py", "            delattr(self, buffer)\n", "            pass\n", FREEZE,
        "test_a_frozen_model and mixer"),
    "a copy of a written frozen block is intact": (
        "freeze.py", '"was_intact": self.changed() is None}', '"was_intact": True}', FREEZE, "test_packs_go_along"),
    "hooks not looked at": (
        "metadata.py", '            or attributes["_backward_hooks"]\n', "", SNAPSHOT,
        "test_hooks and backward and ours and python"),
    "a replaced forward not looked at": (
        "metadata.py", "            or len(attributes) != size\n", "", SNAPSHOT,
        "test_other_parts and ours and python"),
    "another class not looked at": (
        "metadata.py", "            type(module) is not cls\n            or ", "            ", SNAPSHOT,
        "test_other_parts and ours and python"),
    "a part's mode not looked at": (
        "repeat.py", "if block.training or any([part.training for part in self._noisy]):", "if False:", REPEAT,
        "test_the_mode_is_seen"),
    "writes to a frozen block's weights repeated": (
        "repeat.py", "writes = None if frozen is None else _writes(parameters)", "writes = None", REPEAT,
        "test_what_is_frozen"),
    "a call's memory left behind": (
        "patch.py", '("_fused_options", "_snapshot", "_last", "_checked")',
        '("_fused_options", "_snapshot", "_checked")', REPEAT, "test_nothing_is_left"),
    # blocks and adapters
    "dropout in evaluation": (
        "coverage.py", "return drop.p if drop.training and type(drop) is nn.Dropout else 0.0",
        "return drop.p if type(drop) is nn.Dropout else 0.0", "test_modules", "test_noise_follows_the_mode"),
    "one form of GELU for all": (
        "coverage.py", "        return act.approximate\n", '        return "none"\n', "test_modules",
        "test_covered_block_is_timms and float64"),
    "stochastic depth that does not rescale": (
        "coverage.py", "if drop_path_p_of(drop_path) and not drop_path.scale_by_keep:", "if False:", "test_modules",
        "test_noise_that_the_kernels_do_not_have"),
    "the first norm's eps for both": (
        "modules.py", "eps=(norm1.eps, norm2.eps)", "eps=(norm1.eps, norm1.eps)", "test_modules",
        "test_covered_block_is_timms and float64"),
    "a scaled bias unscaled": (
        "adapters/timm.py", 'kept(packs, "ls2 * b4", lambda: scale * b4)', "b4", "test_patch_models",
        "test_timm_blocks_on_the_kernels and Res"),
    "PyTorch's eps forgotten": (
        "adapters/lucidrains.py", '            "eps": norm.eps,\n', "", "test_patch_models", "test_lucidrains"),
    "the channels' gate behind fc2": (
        "adapters/time_series.py", "    axis = -3\n    gate_first = True", "    axis = -3\n    gate_first = False",
        SERIES, "test_models and channels"),
    "BatchNorm without eps": (
        "adapters/batch_norm.py", "(norm.running_var + norm.eps).rsqrt()", "norm.running_var.rsqrt()", SERIES,
        "test_models and BatchNorm"),
    "BatchNorm of the batch taken for a map": (
        "adapters/batch_norm.py", "takes = norm.training or norm", "takes = norm", SERIES,
        "test_batch_norm_in_training"),
    "sums of groups": (
        "adapters/time_series.py", ".mean(1, keepdim=True)", ".sum(1, keepdim=True)", SERIES, "test_models and groups"),
    "softmax for every gate": (
        "adapters/time_series.py", 'return "softmax" if mode == "softmax" else "sigmoid"', 'return "softmax"', SERIES,
        "test_models and sigmoid"),
    "what is made for a call repeated": (
        "adapters/time_series.py", "return not (self.is_grouped() or is_batch_norm(self))", "return True", SERIES,
        "test_a_frozen_batch_norm_takes_its_map_anew"),
    "gradients of a declared block not compared": (
        "adapters/verify.py",
        '        _check_gradients(own, ours, {"x": x, **dict(twin.named_parameters())}, described)\n', "",
        "test_declared_blocks_refused", "test_a_wrong_declaration"),
    # the CPU backend
    "the slowest instruction set": (
        "backends/cpu/library.py", "return next(built for built in module.built if module.runs_here(built))",
        "return module.built[-1]", "test_cpu_backend", "test_the_best_instruction_set"),
    "an instruction set that the CPU lacks": (
        "backends/cpu/library.py", "if not module.runs_here(name):", "if False:", "test_cpu_backend",
        "test_the_best_instruction_set"),
    "features that lie apart read side by side": (
        "backends/cpu/plan.py", "is_dense = x.stride(-1) == 1 or x.shape[-1] == 1", "is_dense = True",
        "test_cpu_backend", "test_layouts and baseline and slice and dtype0"),
    "a converted weight in the next call": (
        "backends/cpu/plan.py", "if copy is not parameter]", "if False]", "test_cpu_calls",
        "test_a_write_is_seen_in_16_bits"),
    "the channel half's eps": (
        "backends/cpu/__init__.py", "options._replace(eps=eps2, dtype=dtype)", "options._replace(dtype=dtype)",
        "test_cpu_mixer", "test_two_eps"),
    "the layer's second eps": (
        "backends/cpu/__init__.py", "ForwardPlan(x, 2, (patches, features), (options.eps, eps2)",
        "ForwardPlan(x, 2, (patches, features), (options.eps, options.eps)", "test_cpu_backend",
        "test_layer_matches_eager"),
    # conversions
    "rows and columns of patches exchanged": (
        "convert/google.py", "w.permute(3, 2, 0, 1)", "w.permute(3, 2, 1, 0)", CONVERT, "test_google_gives"),
    "both LayerNorms exchanged": (
        "convert/google.py", "number = sorted(set(norms[block[1]])).index(int(norm[1]))",
        "number = 1 - sorted(set(norms[block[1]])).index(int(norm[1]))", CONVERT, "test_google_generations"),
    "Google's form of GELU forgotten": (
        "convert/layout.py", '{"act_layer": partial(nn.GELU, approximate="tanh")}', "{}", CONVERT,
        "test_google_gives or test_model_arguments"),
    "lucidrains' rows and columns exchanged": (
        "convert/lucidrains.py", "permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)", CONVERT, "test_lucidrains_gives"),
    "a bias in the order of the parts": (
        "convert/resize.py", "torch.empty_like(b2).index_copy_(0, image, b2)", "b2", CONVERT,
        "test_resized_tokens or test_resize_14"),
    "a bias not interpolated": (
        "convert/resize.py", "(forth @ b2.double()).to(b2)", "(forth @ b2.double() * 0).to(b2)", CONVERT,
        "test_interpolated"),
})  # fmt: skip
