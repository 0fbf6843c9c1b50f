"""Every field of an experiment, with a usable default, its unit and its meaning.

An experiment file calls `get_config()` and assigns; the returned dict is locked, so assigning to a
field that does not exist fails with the list of fields. `0`, `""` and `()` mean "off" or "derive".
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the locked base config; `arg` (the text after `file.py:`) is not used here."""
    del arg
    config = ml_collections.ConfigDict()
    config.model = model_config()
    config.data = data_config()
    config.optim = optim_config()
    config.train = train_config()
    config.eval = eval_config()
    config.log = log_config()
    config.mesh = mesh_config()
    config.lock()
    return config


def model_config() -> ml_collections.ConfigDict:
    """The model: sizes shared by all schemes, then one sub-config a mixer."""
    c = ml_collections.ConfigDict()
    # transformer | transformer_vq | decay | recurrent_memory | stagformer | inattention
    c.name = "transformer"
    c.pattern = ()  # repeating mixers, e.g. ("decay", "decay", "sliding"); () = the model's own
    # mixers that are not this library's, "kind=package.module:NAME": --mixers writes it for the
    # record, and never reads it
    c.outside_mixers = ()
    c.n_layers = 6  # blocks; a multiple of the pattern's length
    c.d_model = 256  # width of the residual stream
    c.n_heads = 4  # query heads
    c.n_kv_heads = 0  # key/value heads: 1 = MQA, 0 = n_heads (MHA)
    c.d_key = 0  # key width a head; 0 = d_model / n_heads
    c.d_value = 0  # value width a head; 0 = d_key
    # swiglu | gelu | relu2 | rwkv (RWKV's channel mix, with a state) | none (blocks of a mixer)
    c.mlp = "swiglu"
    # MLP width; 0 = 8/3 d_model (swiglu), 3.5 (rwkv) or 4 (others), up to a multiple of 32
    c.d_ff = 0
    c.norm = "rms"  # rms | layer
    c.norm_eps = 1e-6  # added to the mean square or the variance
    c.vocab_size = 256  # token ids are 0 .. vocab_size-1: 256 for bytes, 257 for delimited_bytes
    c.tie_embeddings = True  # output matrix = input embedding
    c.embed_scale = 0.0  # multiplies the embedding; 0 = 1 if tied, else sqrt(d_model)
    c.dropout = 0.0  # probability, on what each mixer and MLP adds
    c.embed_dropout = 0.0  # probability, on the embedding
    c.layer_drop = 0.0  # probability, of leaving out all that a mixer or MLP adds to a row
    c.dtype = "float32"  # matrix-product inputs: float32 | bfloat16 (parameters stay float32)
    c.remat = "none"  # recompute in the backward pass: none | dots (keep matrix products) | full
    c.schedule = (
        "layerwise"  # layerwise | sequential | diagonal: order of the (segment, layer) grid
    )
    c.segment_len = 0  # tokens a segment of the schedule; 0 = the whole call is one segment
    c.n_ramp_buckets = 4  # diagonal: widths its ramps are compiled for; more = less waste
    c.layer_axis = ""  # diagonal: mesh axis over which the layers are spread; "" = one device
    c.sequence_axis = ""  # mesh axis over which a call's segments are spread; "" = one device
    c.unroll = 1  # layers a loop iteration: more = longer compilation, less loop overhead

    c.softmax = ml_collections.ConfigDict()
    c.softmax.position = "rotary"  # rotary | relative (learned bias by log-bucketed offset) | none
    c.softmax.rope_theta = 10_000.0  # longest rotary wavelength is 2 pi rope_theta tokens
    # for contexts longer than in pretraining: none | linear (all frequencies / rope_factor) |
    # llama3, yarn (those of few turns within rope_original_len / rope_factor)
    c.softmax.rope_scaling = "none"
    c.softmax.rope_factor = 1.0
    c.softmax.rope_original_len = 0  # llama3, yarn: tokens of a pretraining sequence
    c.softmax.rope_low_turns = 1.0  # llama3, yarn: fewer turns are divided by the whole factor
    c.softmax.rope_high_turns = 4.0  # llama3, yarn: more turns stay as they are; yarn has 32
    c.softmax.rope_amplitude = 0.0  # yarn: multiplies queries and keys; 0 = 0.1 ln(factor) + 1
    c.softmax.qk_norm = False  # RMS-normalise queries and keys a head
    c.softmax.implementation = "auto"  # auto | dense | blockwise | cudnn

    c.sliding = ml_collections.ConfigDict()
    c.sliding.window_len = 128  # tokens a query sees, itself included
    c.sliding.position = "rotary"  # as softmax.position
    c.sliding.rope_theta = 10_000.0
    c.sliding.rope_scaling = "none"  # these as in softmax
    c.sliding.rope_factor = 1.0
    c.sliding.rope_original_len = 0
    c.sliding.rope_low_turns = 1.0
    c.sliding.rope_high_turns = 4.0
    c.sliding.rope_amplitude = 0.0
    c.sliding.qk_norm = False
    c.sliding.implementation = "auto"  # auto | dense | banded | blockwise | cudnn

    c.decay = ml_collections.ConfigDict()
    # retnet: 1-2^(-5-h) | lightning: exp(-2^(-8(h+1)/H)) | transnormer: exp(-8h/H) | none: 1
    # learned: a parameter a head | gated: a function of the token, sigmoid(x W + b)^(1/16)
    c.decay.kind = "retnet"
    # log decay by layer: constant | linear: times 1 - l/L | minimax: times 1 - l/(L - 1), about
    c.decay.depth = "constant"
    c.decay.chunk_len = 64  # tokens a chunk of the forms that have chunks and are no kernels
    c.decay.position = "rotary"  # rotary | none
    c.decay.rope_theta = 10_000.0
    c.decay.feature_map = "none"  # of query and key: none | silu | elu (elu + 1)
    c.decay.value_map = "none"  # of values: the same choices
    # multiplies the normalised output by silu(x W): silu | sigmoid | linear (x W) | none
    c.decay.gate = "silu"
    c.decay.head_norm = "rms"  # of the heads' output: rms | layer | plain_rms (no scale)
    c.decay.norm_span = "head"  # head: each by itself | all: all heads at once
    c.decay.scale_query = True  # divide queries by sqrt(d_key)
    c.decay.conv_len = 0  # tokens that a short convolution mixes before the projections; 0 = none
    # auto | pallas_triton | pallas_mosaic_gpu | two_pass | chunked | block | prefix | quadratic |
    # recurrent | causal_dot_product | recursion | fleet | reference
    c.decay.implementation = "auto"

    c.vq = ml_collections.ConfigDict()
    c.vq.codebook_size = 256  # codewords a key head
    c.vq.window_len = 128  # tokens before a query that keep their own keys, positions and gradients
    c.vq.block_len = 0  # queries a block: speed and memory, never the result; 0 = chosen
    # of the tables before blocks: auto | serial | matmul | associative | pallas_triton
    c.vq.reduction = "auto"
    c.vq.gate = "none"  # silu: the published gated unit (silu values, gated output) | none
    c.vq.position = "relative"  # learned bias by distance, inside the window | none
    c.vq.position_dropout = 0.0  # probability, on the sinusoids behind that bias
    c.vq.position_theta = 100_000.0  # longest wavelength of the sinusoids is 2 pi theta tokens
    c.vq.use_table = True  # see tokens beyond the window, as codes; False = a sliding window
    c.vq.grad_through_cache = True  # values beyond the window get gradients
    c.vq.commitment = 1e-4  # weight of the squared quantisation error in the loss
    c.vq.codebook_decay = 0.99  # of the codebook's running averages, an update; 1 = fixed codebook
    c.vq.codebook_start = "sphere"  # sphere: among the keys | published: near the origin
    c.vq.reseed_below = 0.0  # tokens an update: codes used less are replaced; 0 = never
    c.vq.implementation = "auto"  # auto | pallas_triton | linear | quadratic
    c.vq.search = "auto"  # of the nearest code: auto | pallas_triton | xla

    c.rwkv = ml_collections.ConfigDict()
    c.rwkv.version = 6  # 4 (a weighted average a channel) | 6 (a matrix a head)
    c.rwkv.head_len = 0  # 6: key and value width a head; 0 = n_heads heads of d_key and d_value
    c.rwkv.shift_rank = 32  # 6: of the token-dependent part of the shift
    c.rwkv.decay_rank = 64  # 6: of the token-dependent part of the decay
    c.rwkv.chunk_len = 32  # tokens a chunk of the chunked forms
    c.rwkv.implementation = "auto"  # auto | chunked | recurrent

    c.mamba = ml_collections.ConfigDict()
    c.mamba.version = 2  # 1 (selective scan) | 2 (state-space duality)
    c.mamba.d_state = 0  # numbers a channel (1) or key width a head (2); 0 = 16 (1) or 64 (2)
    c.mamba.expand = 2  # channels / d_model
    c.mamba.conv_len = 4  # tokens that the convolution mixes; 1 = the current one alone
    c.mamba.head_len = 64  # 2: channels a head
    c.mamba.n_groups = 1  # 2: of heads that share input and output weights
    c.mamba.norm_before_gate = False  # 2: norm(y) * gate; False = norm(y * gate)
    c.mamba.min_step = 0.0  # 2: step sizes are at least it
    c.mamba.max_step = 0.0  # 2: and at most it; 0 = no bound
    c.mamba.step_rank = 0  # 1: of the projection to the step sizes; 0 = d_model / 16, rounded up
    c.mamba.chunk_len = 64  # tokens a chunk of the forms that have chunks
    # 1: auto | serial | chunked | recurrent; 2: as decay.implementation
    c.mamba.implementation = "auto"

    c.memory = ml_collections.ConfigDict()
    # armt: a matrix a layer | layerwise: tokens a layer | rmt: tokens through the whole model
    c.memory.kind = "armt"
    c.memory.segment_len = 256  # tokens a segment: what attention sees; memory carries the rest
    c.memory.n_memory_tokens = 16  # that write at a segment's end (and read at its start)
    c.memory.mixer = "softmax"  # inside the segment: any mixer
    c.memory.bptt_segments = 0  # segments a gradient goes back at most; 0 = the training window
    c.memory.d_memory = 64  # armt: width of keys and queries of the matrix
    c.memory.nu = 3  # armt: order of its feature map; 2 nu d_memory features
    c.memory.n_heads = 1  # armt: matrices a layer
    c.memory.correction = True  # armt: count a key in the normaliser only as far as it is new
    c.memory.use_denominator = True  # armt: recall weighted means; False = sums
    c.memory.normalize = False  # armt: features of length 1
    c.memory.eps = 1e-5  # armt: added to denominators; 1e-5 as published, more = tamer training

    c.stagformer = ml_collections.ConfigDict()
    c.stagformer.n_stacks = 2  # n_layers / n_stacks layers each; all start from the embedding
    c.stagformer.share_weights = False  # one stack, passed n_stacks times
    # what a stack gets of the one below: cross (attention in every layer) | add (to its input)
    c.stagformer.handoff = "cross"
    c.stagformer.cross_window = 0  # tokens back that it sees; 0 = all, 1 = a linear map
    c.stagformer.cross_position = "rotary"  # rotary | none
    # decoding keeps kv (keys and values a layer) | memory (their source, once; position none)
    c.stagformer.cross_cache = "kv"
    c.stagformer.combine = "last"  # output: last (stack) | linear (learned sum of all)
    c.stagformer.stagger = True  # False: the control; no token late, and no parallel decoding
    # of one token: lanes (all stacks at once) | sequential | auto (lanes where staggered)
    c.stagformer.decode = "auto"
    # decode with the last pass alone, which then sees its own outputs: an approximation
    c.stagformer.recurrent = False
    c.stagformer.stack_axis = ""  # mesh axis that decoding spreads the stacks over; "" = one device

    c.inattention = ml_collections.ConfigDict()
    c.inattention.memory_position = "sinusoid"  # added to the embeddings: sinusoid | none
    # of scores: relative (learned, by bucket) | near (learned up to n_exact tokens, 0 beyond) |
    # alibi | decoupled (rotary numbers beside the content) | rotary (as a transformer) | none
    c.inattention.score_position = "relative"
    c.inattention.n_exact = 128  # relative, near: distances in tokens with a bias of their own
    c.inattention.max_distance = 4096  # relative: tokens; buckets grow up to it
    c.inattention.d_rotary = 32  # decoupled: rotary numbers a row
    c.inattention.rope_theta = 10_000.0  # of rotary numbers and sinusoids
    c.inattention.rope_scaling = "none"  # of rotary numbers; these as in softmax
    c.inattention.rope_factor = 1.0
    c.inattention.rope_original_len = 0
    c.inattention.rope_low_turns = 1.0
    c.inattention.rope_high_turns = 4.0
    c.inattention.rope_amplitude = 0.0
    c.inattention.d_memory = 0  # width of the memory's rows; 0 = d_model
    c.inattention.share_projections = False  # one W_K and W_V for all layers
    # of decoding: kv (keys and values a layer) | embedding (rows, once) | ids | counts (how often
    # each id occurred) | auto (the smallest that costs no more work than it saves); all are exact
    c.inattention.cache = "auto"
    # of attention among a call's tokens: as softmax; vq: with counts, by the op of vq attention (no
    # gradient to old keys, so not in training)
    c.inattention.implementation = "auto"
    return c


def data_config() -> ml_collections.ConfigDict:
    """Where text comes from and how it is cut into windows."""
    c = ml_collections.ConfigDict()
    # python_source | text | text8 | enwik8 | enwik8_4m | pg19 | pg19_mini | pg19_tfds |
    # imagenet64 | recall_associative | recall_passkey | recall_facts (made up: docs/recall.md)
    c.name = "python_source"
    c.data_dir = ""  # folder of the data set; "" = $LONGCTX_DATA_DIR, else ~/data
    c.files = ()  # text: file names, folders or globs, read in sorted order
    c.validation_files = ()  # text: of that split alone; () = a share of files
    c.test_files = ()  # likewise
    c.text_field = ""  # text: of .jsonl lines and .parquet rows, what holds it; "" = "text"
    c.validation_fraction = 0.05  # text: share of the bytes, before the test share
    c.test_fraction = 0.05  # text: share of the bytes, at the end
    c.download = True  # enwik8: fetch it if it is not in data_dir
    # bytes | delimited_bytes (257 ids, 256 follows each document: imagenet64 needs it) | the path
    # of a SentencePiece model, *.model (scripts.train_tokenizer makes one) or of a tokenizer.json
    c.tokenizer = "bytes"
    c.seq_len = 256  # tokens a row: the window between two parameter updates
    c.global_batch_size = 16  # rows a step, over all processes
    c.order = "stripes"  # stripes: row b of a batch continues row b of the last | shuffled: windows
    c.n_workers = 0  # data loading threads; 0 = the library's choice

    c.recall = ml_collections.ConfigDict()  # needs order = "shuffled"; a row is seq_len bytes
    c.recall.segment_len = 32  # bytes: the unit of distance; the row's last segment asks
    c.recall.max_distance_segments = 0  # from the question to its fact, at most; 0 = the whole row
    c.recall.n_rows = 256  # validation rows, and as many test rows
    c.recall.n_questions = 1  # associative: a row
    c.recall.pairs_per_segment = 1  # associative
    c.recall.key_len = 2  # associative: letters
    c.recall.value_len = 1  # associative: letters
    c.recall.n_symbols = 26  # associative: letters in use, of keys and of values
    c.recall.noise = "pad"  # associative, around the pairs: pad (dots) | random (digits)
    c.recall.rewrite = False  # associative: keys come again, and the newest value counts
    c.recall.n_keys = 0  # associative, rewrite: keys in a row; 0 = half the number of pairs
    c.recall.text = "pg19_mini"  # passkey, facts: the data set they are hidden in
    c.recall.n_digits = 5  # passkey
    c.recall.n_facts = 4  # facts: sentences a row, with those that answer
    c.recall.chain = False  # facts: ask where an object is, which somebody carries
    return c


def optim_config() -> ml_collections.ConfigDict:
    """Optimizer and learning-rate schedule."""
    c = ml_collections.ConfigDict()
    c.name = "adamw"  # adamw | adam | lion | adafactor | muon | sgd
    c.learning_rate = 1e-3  # peak
    c.schedule = "cosine"  # cosine | linear | constant | wsd (warm up, stay, decay)
    c.warmup_steps = 100  # linear, from 0
    c.final_fraction = 0.1  # learning rate at the end, as a share of the peak
    c.decay_fraction = 0.2  # wsd: share of the steps spent decaying
    c.weight_decay = 0.1  # decoupled; matrices only
    c.decay_times_rate = True  # weight decay is multiplied by the learning rate
    c.parameter_scale = False  # adafactor: updates are relative to the size of the parameter
    c.beta1 = 0.9
    c.beta2 = 0.95
    c.eps = 1e-8
    c.clip_norm = 1.0  # global norm of the gradient; 0 = off
    return c


def train_config() -> ml_collections.ConfigDict:
    """The run: length, state, checkpoints."""
    c = ml_collections.ConfigDict()
    c.n_steps = 1_000  # parameter updates
    c.seed = 0  # of parameters, dropout and data order
    c.carry_cache = True  # stripes: hand each window's final cache (no gradient) to the next
    c.cold_start_every = 0  # updates after which the carried cache starts empty again; 0 = never
    # Rows of data.seq_len tokens cut into shorter ones early on: from step curriculum_starts[i] on,
    # rows have curriculum_lens[i] tokens, and there are as many more of them; () = off
    c.curriculum_starts = ()
    c.curriculum_lens = ()
    c.cache_len = 0  # tokens a full-attention cache keeps on a stream; 0 = data.seq_len
    c.n_microbatches = 1  # gradient accumulation within a step
    c.loss_chunk_len = 0  # tokens whose logits exist at once in the loss; 0 = all
    # tokens a row whose loss counts, drawn anew each update; 0 = all. Only inattention computes
    # less for it, in windows that start anew
    c.loss_positions = 0
    c.ema_decay = 0.0  # exponential average of the weights, used by evaluation; 0 = off
    c.init_from = ""  # work directory whose weights start this run; "" = fresh
    c.checkpoint_every = 500  # steps; the last step is always saved
    c.keep_latest = 2  # checkpoints
    c.keep_every = 0  # steps: these checkpoints are never deleted; 0 = off
    c.profile_start = 0  # first step of the profiler window (trace in workdir/profile)
    c.profile_steps = 0  # length of the profiler window; 0 = off
    return c


def eval_config() -> ml_collections.ConfigDict:
    """Evaluation during training and by `scripts.evaluate`."""
    c = ml_collections.ConfigDict()
    c.every = 500  # steps; 0 = only at the end
    c.split = "validation"  # during training
    c.max_bytes = 0  # of the split, during training; 0 = all
    c.batch_size = 8  # the split is cut into this many stripes, each with its own carried cache
    c.seq_len = 0  # tokens a call; 0 = data.seq_len
    c.cache_len = 0  # tokens a full-attention cache keeps; 0 = train.cache_len
    c.sample_every = 0  # steps between texts that the model writes into samples.jsonl; 0 = off
    c.sample_prompts = ("\n",)
    c.sample_tokens = 200  # tokens a sample
    c.sample_temperature = 1.0
    return c


def mesh_config() -> ml_collections.ConfigDict:
    """How a run is spread over devices; their product is all devices of all processes."""
    c = ml_collections.ConfigDict()
    c.data = 0  # share out rows; 0 = all devices that the others leave, as far as rows go round
    c.model = 0  # share out heads, MLP and vocabulary (tensor parallel); 0 = what data leaves
    c.sequence = 1  # share out the tokens of a row (context parallel)
    c.layer = 1  # share out the layers (model.schedule = "diagonal")
    # parameters and optimizer state spread over data, too: on | off | auto (if they would take
    # over a quarter of a device's memory)
    c.fsdp = "auto"
    c.rules = ()  # before the built-in ones: "PATTERN=AXIS,AXIS" of last dimensions, "-" = no axis
    return c


def log_config() -> ml_collections.ConfigDict:
    """Where metrics go, besides the console and metrics.jsonl."""
    c = ml_collections.ConfigDict()
    c.every = 20  # steps between metric records
    c.tensorboard = True
    # seconds without a step after which the stacks of all threads go to hang.txt; 0 = off. More
    # than compiling, saving or evaluating takes
    c.hang_timeout_s = 1_800.0
    c.hang_exit = False  # and end the process then, for a scheduler to start it again
    c.wandb = False  # needs the extra `wandb`
    c.wandb_project = "longctx_jax"
    return c
