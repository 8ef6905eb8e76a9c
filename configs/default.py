"""Every setting there is, with its meaning: the schema that the other configs start from.

The values are those of the paper's Inception on ImageNet, from which configs/networks.py derives
the other four networks. What the paper leaves open names its source.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # Everything random follows from it: the weights, the order of the examples, distortions.
    config.seed = 0

    config.data = ConfigDict()
    # "digits" (comes with scikit-learn), "synthetic", "folder" for images of your own, or the TFDS
    # name of an image classification set: "mnist", "cifar10", "imagenet2012", ...
    config.data.name = "imagenet2012"
    # Where TFDS finds or prepares the set; "" is its own default, ~/tensorflow_datasets. Of
    # "folder", the one that holds SPLIT/CLASS/IMAGE.
    config.data.data_dir = ""
    # Parts of splits are TFDS's, "train[:90%]"; "folder" has those in percent, of each class by
    # itself, and takes ".[:90%]" and ".[90%:]" where data_dir holds CLASS/IMAGE.
    config.data.train_split = "train"
    config.data.validation_split = "validation"
    # Side in pixels of the square image that the network sees; 0 keeps the size of the data.
    config.data.image_size = 224
    # "inception": area 8-100%, aspect 3/4-4/3, resized (GoogLeNet); "shift": by up to an eighth
    # of the side, padded with the mean grey; "none": the whole image.
    config.data.crop = "inception"
    # Mirrored left to right with probability 1/2.
    config.data.mirror = True
    # Strength of the photometric distortions; 1 is full, 0 is none.
    config.data.distortion = 1.0
    # Beyond the paper, from keras-cv: magnitude of RandAugment, from 0, none, to 1.
    config.data.random_augment = 0.0
    # Images mixed in pairs, with their labels: alpha of the Beta distribution that the shares are
    # drawn from; 0 is never. With both, each batch takes one of the two in turn. Each replica has to
    # have an even number of examples.
    config.data.mixup = 0.0
    config.data.cutmix = 0.0
    # Pixels thresholded at one half to 0 and 1 (the paper's section 4.1); else scaled to [-1, 1].
    config.data.binary = False
    # "examples": permuted within shards; "shards": only the order of the shards changes. What is in
    # memory counts as one shard, and single files are permuted in any case.
    config.data.shuffle = "shards"
    # How many examples of each split a process may find that can't be read. Each is named in the
    # log; in training another one takes its place, in evaluation it doesn't count.
    config.data.max_bad_examples = 0

    config.model = ConfigDict()
    # "inception" (Figure 5) or "mlp" (section 4.1).
    config.model.name = "inception"
    # inception: "inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid", of the ensemble
    # "bn_x30_ensemble_1" to "bn_x30_ensemble_6", and "inception_sigmoid"; mlp: "baseline", "bn".
    config.model.variant = "inception"
    # Built as by the "paper", TF-"slim", or the "caffe" ports: projections, stem, padding, biases.
    config.model.preset = "paper"
    # Channels projected after the pools of 4c and 4d; 0 is the preset's.
    config.model.pool_projection = 0
    # Factor on every number of channels.
    config.model.width = 1.0
    # "imagenet": 7x7 separable with stride 2, pool, 3x3, pool; "cifar": 3x3 with stride 2 and no
    # pools; "digits": 3x3 with stride 1 and no pools.
    config.model.stem = "imagenet"
    # A Keras initializer's name for all kernels, or "normal" with initializer_stddev.
    config.model.initializer = "he_normal"
    config.model.initializer_stddev = 0.01
    # Factor on the initial weights of the convolutions.
    config.model.initializer_scale = 1.0
    # Fraction of the activations dropped before the classifier while training.
    config.model.dropout = 0.4
    config.model.local_response_normalization = True
    # BN in module 5b per activation instead of per feature map.
    config.model.per_activation_bn = False
    # Weight of the loss of an auxiliary classifier on module 4d, which is there for training
    # alone; 0 leaves it out. Inception-v3 has 0.4.
    config.model.auxiliary_weight = 0.0

    config.batch_norm = ConfigDict()
    # Fraction of the moving statistics that is kept at each step (TF-Slim's value).
    config.batch_norm.momentum = 0.9997
    # Added to the variance, under the root; 0 is the preset's: 1e-3 (TF-Slim's value), in "caffe"
    # 1e-5.
    config.batch_norm.epsilon = 0.0
    # Batch statistics over all replicas instead of over each one's own examples.
    config.batch_norm.synchronized = False

    config.train = ConfigDict()
    config.train.steps = 31_000_000
    config.train.global_batch_size = 32
    # SGD's momentum (GoogLeNet).
    config.train.momentum = 0.9
    # Weight of the L2 penalty l2/2 * |w|^2 on kernels (TF-Slim's value).
    config.train.l2 = 4e-5
    # Share of the labels that is spread over all classes.
    config.train.label_smoothing = 0.0
    # Parts in which a global batch is taken one after the other, their gradients summed, where it
    # is too large for the devices' memory. Each is a batch of its own for BN.
    config.train.micro_batches = 1
    # Fraction kept at each step of a moving average of the weights, by which the network is
    # evaluated wherever it is by population statistics, or always where it has no BN; 0 is none.
    config.train.ema = 0.0
    # The run ends at the first evaluation with such an accuracy, a fraction; 0 goes on to `steps`.
    config.train.until_accuracy = 0.0
    # How often a run that diverges goes back to its last checkpoint, each time with its learning
    # rate multiplied by retry_factor.
    config.train.retries = 0
    config.train.retry_factor = 0.5
    # A Keras dtype policy: "float32", "mixed_bfloat16", or "mixed_float16", whose loss is scaled.
    config.train.precision = "float32"
    # Steps that run on the device between two looks at the loss; each gives a line of metrics.
    config.train.steps_per_loop = 500

    config.schedule = ConfigDict()
    # Learning rate at reference_batch_size; it scales linearly with train.global_batch_size.
    config.schedule.base_rate = 0.0015
    config.schedule.reference_batch_size = 32
    # The rate rises linearly from 0 over these epochs.
    config.schedule.warmup_epochs = 0.0
    # "steps", or "cosine": after the warm-up down to 0 at train.steps.
    config.schedule.decay = "steps"
    # The rate is multiplied by decay_factor every decay_epochs (GoogLeNet); 1 holds it constant.
    config.schedule.decay_factor = 0.96
    config.schedule.decay_epochs = 8.0

    config.evaluation = ConfigDict()
    # On the validation examples, and in any case at the end.
    config.evaluation.every_steps = 20_000
    config.evaluation.global_batch_size = 32

    config.population = ConfigDict()
    # When the moving statistics give way to those of the population (Algorithm 2): "never"; "end":
    # for the last evaluation and in the finished network; "evaluations": for each evaluation too.
    config.population.when = "never"
    # They are taken over so many batches, the first of the training, which each take about as long
    # as a training step, or less.
    config.population.num_batches = 100

    config.record = ConfigDict()
    # Name of a layer of which percentiles of the input are recorded during the training, as the
    # paper's Figure 1b and c; "" records nothing.
    config.record.layer = ""
    # Index into the input's last axis: a unit, or a feature map with all of its locations.
    config.record.unit = 0
    config.record.percentiles = (15, 50, 85)
    # Before the first step, and every so many.
    config.record.every_steps = 250
    # The first of the training, in whole batches, which are held in the devices' memory.
    config.record.num_examples = 1_000

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 5_000
    # How many of the latest stay.
    config.checkpoint.keep = 3

    config.distribution = ConfigDict()
    # "one_device", "mirrored", "multi_worker" (each process a host, named by TF_CONFIG), or "tpu"
    # (all cores of a TPU of one host).
    config.distribution.strategy = "mirrored"
    # Of "mirrored": 0 takes every accelerator, or one CPU replica where there is none; n > 0 takes n
    # of them. The others stay at 0.
    config.distribution.replicas = 0

    return config.lock()
