"""A few calls into a prebuilt libllama, through ctypes: every position's logits. Standard library only.

The structs follow llama.cpp v0.5.0 (include/llama.h). A library with another layout is
noticed, because the fields that default_params() fills would not hold their known defaults.
"""
import ctypes as C
from pathlib import Path

F32 = 0  # ggml type id
FLASH_ATTENTION_OFF = 0


class ModelParams(C.Structure):
    _fields_ = (
        [("devices", C.c_void_p), ("overrides", C.c_void_p)]
        + [(n, C.c_int32) for n in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")]
        + [(n, C.c_void_p) for n in ("tensor_split", "progress", "progress_data", "kv_overrides")]
        + [(n, C.c_bool) for n in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")]
    )


class ContextParams(C.Structure):
    _fields_ = (
        [(n, C.c_uint32) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")]
        + [(n, C.c_int32) for n in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling", "pooling", "attention", "flash_attn")]
        + [(n, C.c_float) for n in ("rope_base", "rope_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")]
        + [("yarn_orig", C.c_uint32), ("defrag", C.c_float), ("cb_eval", C.c_void_p), ("cb_data", C.c_void_p)]
        + [("type_k", C.c_int32), ("type_v", C.c_int32), ("abort", C.c_void_p), ("abort_data", C.c_void_p)]
        + [(n, C.c_bool) for n in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")]
        + [("samplers", C.c_void_p), ("n_samplers", C.c_size_t), ("ctx_other", C.c_void_p)]
    )


class Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.POINTER(C.c_float)),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
WATCH = C.CFUNCTYPE(C.c_bool, C.c_void_p, C.c_bool, C.c_void_p)


class LlamaCpp:
    """The library in `folder`; `cpu` names the build of its CPU code ("x64": no vector extension)."""

    def __init__(self, folder, cpu="x64"):
        folder = Path(folder)
        ggml = C.CDLL(str(next(folder.glob("libggml.*so"))), mode=C.RTLD_GLOBAL)
        self.base = base = C.CDLL(str(next(folder.glob("libggml-base.*so"))), mode=C.RTLD_GLOBAL)
        base.ggml_get_name.restype, base.ggml_get_name.argtypes = C.c_char_p, [C.c_void_p]
        base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = C.c_size_t, [C.c_void_p]
        base.ggml_backend_tensor_get.argtypes = [C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t]
        self.lib = lib = C.CDLL(str(next(folder.glob("libllama.*so"))))
        self.quiet = LOG(lambda level, text, _: print(text.decode(), end="") if level == 4 else None)
        lib.llama_log_set(self.quiet, None)
        ggml.ggml_backend_load.restype = C.c_void_p
        if not ggml.ggml_backend_load(str(folder / f"libggml-cpu-{cpu}.so").encode()):
            raise SystemExit(f"no CPU code for {cpu} in {folder}")
        for name, result, arguments in [
            ("llama_model_default_params", ModelParams, []),
            ("llama_context_default_params", ContextParams, []),
            ("llama_model_load_from_file", C.c_void_p, [C.c_char_p, ModelParams]),
            ("llama_init_from_model", C.c_void_p, [C.c_void_p, ContextParams]),
            ("llama_model_get_vocab", C.c_void_p, [C.c_void_p]),
            ("llama_vocab_n_tokens", C.c_int32, [C.c_void_p]),
            ("llama_batch_init", Batch, [C.c_int32] * 3),
            ("llama_batch_free", None, [Batch]),
            ("llama_decode", C.c_int32, [C.c_void_p, Batch]),
            ("llama_get_logits_ith", C.POINTER(C.c_float), [C.c_void_p, C.c_int32]),
            ("llama_get_memory", C.c_void_p, [C.c_void_p]),
            ("llama_memory_clear", None, [C.c_void_p, C.c_bool]),
            ("llama_free", None, [C.c_void_p]),
            ("llama_adapter_lora_init", C.c_void_p, [C.c_void_p, C.c_char_p]),
            ("llama_set_adapters_lora", C.c_int32, [C.c_void_p, C.POINTER(C.c_void_p), C.c_size_t, C.POINTER(C.c_float)]),
            ("llama_set_adapter_cvec", C.c_int32, [C.c_void_p, C.POINTER(C.c_float), C.c_size_t] + [C.c_int32] * 3),
            ("llama_model_free", None, [C.c_void_p]),
        ]:
            call = getattr(lib, name)
            call.restype, call.argtypes = result, arguments
        lib.llama_backend_init()
        m, c = lib.llama_model_default_params(), lib.llama_context_default_params()
        known = (m.load_mtp in (0, 1), m.use_extra_bufts, c.n_batch, c.n_ubatch, c.type_k, c.type_v, c.offload_kqv, c.n_samplers)
        if known != (True, True, 2048, 512, 1, 1, True, 0):
            raise SystemExit(f"this libllama lays out its parameters differently: {known}")

    def logits(self, path, sequences):
        """Logits at every position of every sequence: a list of [tokens][vocabulary] lists."""
        session = Session(self, path)
        out = [session.decode(ids, clear=True) for ids in sequences]
        session.close()
        return out


class Session:
    """A model, with an adapter or a control vector where these are given.

    lora: the adapter's path. control_vector: (values from block 1 on, width). watch: called with (block, values) of every
    block's output, the residual stream.
    """

    def __init__(self, library, path, lora=None, control_vector=None, watch=None):
        # The library calls back into `library` as long as it runs.
        self.library, self.lib, base = library, library.lib, library.base
        lib = self.lib
        mp = lib.llama_model_default_params()
        mp.n_gpu_layers, mp.use_extra_bufts = 0, False
        self.model = lib.llama_model_load_from_file(str(path).encode(), mp)
        if not self.model:
            raise SystemExit(f"llama.cpp refuses {path}")

        def see(tensor, ask, _):
            name = base.ggml_get_name(tensor).decode()
            if name.startswith("l_out-") and not ask:
                n = base.ggml_nbytes(tensor) // 4
                values = (C.c_float * n)()
                base.ggml_backend_tensor_get(tensor, values, 0, 4 * n)
                watch(int(name[6:]), list(values))
            return name.startswith("l_out-") or not ask

        self.callback = WATCH(see)
        cp = lib.llama_context_default_params()
        cp.n_ctx, cp.n_threads, cp.n_threads_batch = 256, 1, 1
        cp.flash_attn, cp.type_k, cp.type_v = FLASH_ATTENTION_OFF, F32, F32
        if watch:
            cp.cb_eval = C.cast(self.callback, C.c_void_p)
        self.context = lib.llama_init_from_model(self.model, cp)
        if lora:
            adapter = lib.llama_adapter_lora_init(self.model, str(lora).encode())
            if not adapter:
                raise SystemExit(f"llama.cpp refuses the adapter {lora}")
            if lib.llama_set_adapters_lora(self.context, (C.c_void_p * 1)(adapter), 1, (C.c_float * 1)(1.0)) != 0:
                raise SystemExit(f"llama.cpp can't apply the adapter {lora}")
        if control_vector:
            values, width = control_vector
            data = (C.c_float * len(values))(*values)
            if lib.llama_set_adapter_cvec(self.context, data, len(values), width, 1, len(values) // width) != 0:
                raise SystemExit("llama.cpp can't apply the control vector")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.position = 0

    def decode(self, ids, clear=False):
        """Reads tokens behind those before (or, with `clear`, from the start); their logits, [tokens][vocabulary]."""
        lib = self.lib
        if clear:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
            self.position = 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.position + i, 1, 1
            batch.seq_id[i][0] = 0
        if lib.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp can't decode")
        out = [lib.llama_get_logits_ith(self.context, i)[:self.vocabulary] for i in range(len(ids))]
        lib.llama_batch_free(batch)
        self.position += len(ids)
        return out

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
