"""Every field of a config, once: its name, its type (that of its default), its meaning.

Another config file starts from `get_config()` here and changes what differs. A field is
overridden by `--config.FIELD=VALUE`.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """A row LSTM with plain settings."""
    config = ml_collections.ConfigDict()
    # All randomness of a run (initialisation, order of examples) follows from this.
    config.seed = 0
    # '', or several runs: a mapping from fields to values, of which all combinations are trained,
    # "{'seed': (1, 2, 3), 'optimizer.learning_rate': (1e-3, 4e-3)}". Fields that go together share a key:
    # "{'model.cell, model.hidden_size': (('gru', 149), ('lstm', 128))}".
    config.sweep = ""
    # '', or hyperparameters to choose, a mapping as above. For each combination of the sweep's other fields every
    # candidate first trains for choose_steps steps, with the sweep's first seed; the best by validation is taken.
    config.choose = ""
    # How many steps each of these trials has; a cosine ends with them.
    config.choose_steps = 0

    data = config.data = ml_collections.ConfigDict()
    # 'idx': IDX files in runtime.data_dir; 'tfds': by name, through tensorflow_datasets, whose
    # folder TFDS_DATA_DIR names;
    # 'embedded': 5,000 digits in the package; 'auto': a given folder, else a copy that TFDS
    # has, else its download, else (for 'mnist') embedded.
    data.source = "auto"
    # What 'tfds' and 'auto' look for: 'mnist', 'fashion_mnist', 'kmnist', 'emnist/balanced', ...
    data.name = "mnist"
    # 'row': 28 steps of 28 values; 'pixel': 784 steps of one.
    data.view = "row"
    # A named convention for permutation, split, scaling and selection: 'seqmnist' (ours), or
    # another's with its flaws: 'tutorial2018', 's4', 'exprnn', 'lem', 'cornn', 'tcn', 'ccnn',
    # 'lmu', 'indrnn', 'annotated_s4' or 'rbn'. `--mode=describe` says where it is from.
    # `permutation`, `split`, `scaling` and `selection` below replace its values where they are not None.
    data.protocol = "seqmnist"
    # Read the pixels in the protocol's permuted order ('seqmnist': numpy:92916).
    data.permuted = False
    # Counts more than `permuted`: 'none'; 'numpy:SEED', numpy.random.RandomState(SEED).permutation;
    # 'torch:SEED', torch.randperm after torch.manual_seed(SEED); 'bit_reversal', as S4;
    # 'numpy_randint:SEED', drawn with replacement, so that pixels are repeated and missing.
    data.permutation = config_dict.placeholder(str)
    # Which training images validate, the others train: 'first:N', 'last:N', or 'torch:N:SEED',
    # N by torch.utils.data.random_split ('torch:N:SEED:DRAWS': after so many other draws).
    data.split = config_dict.placeholder(str)
    # 'unit': pixels to [0, 1]; 'symmetric': to [-1, 1]; 'signed': to [-1, 1), x / 128 - 1;
    # 'standard': minus MNIST's mean, divided by its standard deviation (0.1307 and 0.3081).
    data.scaling = config_dict.placeholder(str)
    # 0, or: each training sequence ends after a random number of steps, at least this many.
    data.min_length = 0
    # 'validation' or 'last': which checkpoint is reported ('test:N', the best on the first N
    # test images, only reproduces results that were so chosen).
    data.selection = config_dict.placeholder(str)

    model = config.model = ml_collections.ConfigDict()
    # 'rnn': recurrent layers; 'deep': a stack of residual blocks, each a norm, a recurrent layer, a gated linear unit
    # and a skip connection; 'tcn': a temporal convolutional network of num_layers levels of hidden_size channels, each
    # with two convolutions of kernel_size, weight-normalised; 'mlp': num_layers hidden layers on all values at once;
    # 'linear': none.
    model.name = "rnn"
    # 'lstm', 'gru' (reset-after, as cuDNN and PyTorch), 'gru_reset_before', 'min_gru', 'min_lstm', 'elman', 'ur_lstm',
    # 'ur_gru', 'peephole_lstm', 'ind_rnn', 'exp_rnn', 'cornn', 'lem', 'lru', 's5', 'diagonal', or a cell of your own
    # as 'MODULE:NAME'.
    model.cell = "lstm"
    # '', or other numbers in the cell's equations or initialisation than its defaults: a mapping, "{'dt': 0.3}".
    model.cell_options = ""
    model.hidden_size = 64
    model.num_layers = 1
    # Of the TCN: steps that a convolution spans, before its dilation.
    model.kernel_size = 7
    # Of 'deep': '', num_layers blocks of hidden_size channels; or the channels x blocks of stages, "32x1, 64x2, 128x1".
    model.stages = ""
    # Of 'deep': so many steps of a stage, side by side and projected, make one of the next.
    model.shorten = 4
    # Of 'rnn': 0, or the order of a Legendre memory of the whole sequence (LMU) that the layers read beside each value.
    model.memory = 0
    # What is read of the recurrent layers: the 'last' output, or the 'mean' of all.
    model.reading = "last"
    # Hidden layers between that and the logits: layer norm, GELU, dropout (output_keep) before a dense layer each.
    model.head_layers = 0
    # Each layer also reads backwards and hands on both outputs side by side.
    model.bidirectional = False
    # Input and recurrent kernel: 'glorot_uniform' (over the joint kernel) or 'orthogonal' (per gate).
    model.kernel_init = "glorot_uniform"
    # 'constant': the LSTM's forget gate starts at forget_bias, all else at zero (the UR cells: as 'uniform').
    # 'log_uniform': time scales spread evenly in the logarithm, b ~ U(0, log T), T the
    # sequence length: the GRU's update bias is b; the LSTM's forget bias b and input bias -b.
    # 'chrono': the same with b = log U(1, T - 1). 'uniform': with gates even in (1/d, 1 - 1/d),
    # d the hidden size.
    model.gate_bias = "constant"
    # The T of 'log_uniform' and 'chrono' in steps; 0 means the sequence length.
    model.longest_time_scale = 0
    model.forget_bias = 1.0
    # Between recurrent and dense layer: 'none'; 'batch': batch normalisation; 'frozen':
    # the same with moving statistics that never move (an affine layer).
    model.norm = "none"
    # 'glorot_uniform' or 'orthogonal' (bias zero), 'random_normal' (kernel and bias N(0, 1)).
    model.dense_init = "glorot_uniform"
    # How exact the recurrence's matrix products are; sums and all else are float32. 'float32': in full, on every
    # device; 'tensorfloat32': on a GPU operands keep 10 bits of the fraction; 'bfloat16': 7 bits. 'auto': float32, and
    # on a GPU tensorfloat32, which its kernel is made for.
    model.precision = "auto"
    # 0, or: the recurrence remembers its state every so many steps and computes the others
    # again in the backward pass: 1.4 to 1.8 times the time, far less memory.
    model.remat = 0
    # Steps laid out in one pass of the loop over time: 1 is a loop, the sequence length none at all. Above 1 it
    # is a plain lax.scan, without the kernel.
    model.unroll = 1
    # Variational dropout: one mask a sequence, the same at every step (but in the TCN). The probability to keep
    # a unit of each layer's input, of its output, and of the h that its next step sees.
    dropout = model.dropout = ml_collections.ConfigDict()
    dropout.input_keep = 1.0
    dropout.output_keep = 1.0
    dropout.state_keep = 1.0

    optimizer = config.optimizer = ml_collections.ConfigDict()
    # 'rmsprop', 'adam', 'adamw' (Adam with decoupled weight decay) or 'sgd'.
    optimizer.name = "rmsprop"
    optimizer.learning_rate = 1e-3
    # 'constant'; 'warmup_cosine': linear from 0 over warmup_steps, then a cosine down to final_fraction of
    # learning_rate at the last step; or 'drop': final_fraction of it after drop_steps.
    optimizer.schedule = "constant"
    optimizer.warmup_steps = 100
    optimizer.drop_steps = 1000
    optimizer.final_fraction = 0.01
    # TF1's RMSProp: epsilon inside the root, a mean square that starts at one.
    optimizer.rmsprop_decay = 0.9
    optimizer.rmsprop_epsilon = 1e-10
    optimizer.rmsprop_initial_mean_square = 1.0
    optimizer.adam_beta1 = 0.9
    optimizer.adam_beta2 = 0.999
    optimizer.adam_epsilon = 1e-8
    # 'adamw': each step takes rate * decay of every kernel off it: of no bias, no norm, and none of recurrent_rate.
    optimizer.weight_decay = 1e-4
    # The share of learning_rate at which the parameters of the state's own motion train, which never decay: the vectors
    # of 'lru', 's5', 'diagonal' and 'ind_rnn', the skew-symmetric matrix of 'exp_rnn'.
    optimizer.recurrent_rate = 1.0
    # 0, or: a moving average of the parameters is what is evaluated, of this decay a step (at first of less:
    # (1 + step) / (10 + step)).
    optimizer.ema_decay = 0.0
    clip = optimizer.clip = ml_collections.ConfigDict()
    # The largest gradient norm of one unit.
    clip.norm = 1.0
    # What is clipped: 'recurrent', 'all_but_dense', 'all' or 'none'.
    clip.mask = "recurrent"
    # What has one norm: 'tensor' (the LSTM's two kernels count as one), 'layer', or
    # 'group' (everything masked).
    clip.unit = "tensor"

    train = config.train = ml_collections.ConfigDict()
    train.batch_size = 32
    train.steps = 5000
    # Gradient accumulation: a batch runs in so many parts, one after the other, in a part's memory.
    train.accumulate = 1
    # The share of a label that is spread evenly over all classes.
    train.label_smoothing = 0.0
    # The standard deviation of Gaussian noise that is added to the values of training batches, after scaling.
    train.noise = 0.0
    # Steps between evaluations on the validation set (and reports of training metrics).
    train.eval_every = 250

    # How and where a run executes. Stored with it, but no part of its identity: a run
    # may be resumed with other values here.
    runtime = config.runtime = ml_collections.ConfigDict()
    # What runs the recurrence: 'auto' ('native' where it can, else 'fused'), 'native' (the device's kernel: in
    # C++ on CPUs, in CUDA on GPUs), 'fused' (JAX, its backward pass made of the step) or 'scan' (plain `lax.scan`).
    runtime.backend = "auto"
    # As model.precision, wherever the model is not trained: 'float32', 'tensorfloat32' or 'bfloat16'.
    runtime.eval_precision = "float32"
    # How a run or a sweep spreads over several devices: 'replica:R,data:D' is R groups of D devices;
    # replicas are divided among the groups, each batch among the devices of one. 'auto': as many groups
    # as divide the replicas, then as many devices in each as divide the batch.
    runtime.mesh = "auto"
    # '' for a process alone. Several processes: 'auto' under Slurm, Open MPI or Kubernetes, else
    # 'ADDRESS:PORT,COUNT,INDEX': where the first listens, how many there are, which this is.
    runtime.distributed = ""
    # Where the groups of a sweep run: '' one after another in this process; 'local', each as a process;
    # 'slurm', each as a job. The last two by submitit, whose parameters the options are, as
    # "{'timeout_min': 60, 'slurm_partition': 'gpu'}".
    runtime.executor = ""
    runtime.executor_options = ""
    # Folder of the IDX files; '' means the environment variable SEQMNIST_DATA_DIR, or none.
    runtime.data_dir = ""
    # Folder of compiled programs, which the next start then need not compile; '' means the
    # folder that JAX_COMPILATION_CACHE_DIR names, else the user's cache folder, 'none' none.
    runtime.compilation_cache = ""
    # Steps between checkpoints; 0: at each evaluation. Each evaluation and the last step have one anyway.
    runtime.checkpoint_every = 0
    # Seconds between additional checkpoints; 0: no additional ones.
    runtime.checkpoint_seconds = 0.0
    # Whether a GPU gives the same bits every time, with slower operations where there are such. A CPU always does.
    runtime.deterministic = False
    # '', or the first and the last step of which JAX's profiler keeps a trace for TensorBoard, as '100:110'.
    runtime.profile_steps = ""
    # Images per evaluation batch.
    runtime.eval_batch_size = 500
    # About how long one dispatch of steps runs before Python looks up (for progress lines
    # and Ctrl-C).
    runtime.dispatch_seconds = 2.0
    return config
