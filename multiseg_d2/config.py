"""Every configuration key that this project adds to Detectron2's, in one place."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_multiseg_config"]


def add_multiseg_config(cfg: CN) -> None:
    """Adds the project's keys, with their defaults, to a Detectron2 config (in place).

    Nothing here repeats what a label space knows: there is no number of classes. ``tests/test_config.py`` counts the
    keys.
    """
    # Python modules of your own to import first, by name or as paths of .py files (relative to the working directory):
    # they register heads, decoders or backbones, which the config can then name. Their code is run.
    cfg.IMPORTS = ()
    _add_data(cfg)
    _add_model(cfg)
    _add_head(cfg)
    _add_training(cfg)
    _add_test(cfg)


def _add_data(cfg: CN) -> None:
    # ---- Datasets -----------------------------------------------------------------------------------------------
    # Dataset spec files (YAML) to register beside the packaged ones; relative paths start from the working directory.
    cfg.DATASETS.SPECS = ()
    # Universal taxonomy: "" or "packaged" = data/taxonomy.yaml, "mseg" = MSeg's 194 classes, "exact_names" = union by
    # exact class name (UniSeg's rule), else the path of a taxonomy file.
    cfg.DATASETS.TAXONOMY = ""
    # Label-remapping baseline: name of the dataset whose label space all training labels are mapped to, "" = none.
    cfg.DATASETS.REMAP_TO = ""

    # ---- What a step contains (data/schedule.py) -----------------------------------------------------------------
    # "alternation": IMS_PER_BATCH images of *every* dataset per step; "fixed": DATALOADER.WEIGHTS gives the number of
    # images per dataset in a step; "size": a mixture of IMS_PER_BATCH images, p ~ size ** (1 / TEMPERATURE);
    # "weights": a mixture with the probabilities of DATALOADER.WEIGHTS.
    cfg.DATALOADER.SCHEDULE = "alternation"
    # One number per entry of DATASETS.TRAIN, in its order; used by "fixed" and "weights" only.
    cfg.DATALOADER.WEIGHTS = ()
    # "size" only: 1 = proportional to size, 2 = square root, towards infinity = uniform.
    cfg.DATALOADER.TEMPERATURE = 1.0
    # "alternation" only: the paper's interval t. 1: all datasets in every step, one update per round (CDCL's DAT).
    # t > 1: one dataset per step, t consecutive steps before the next dataset's turn (our reading; see configs/cdcl).
    cfg.DATALOADER.INTERVAL = 1

    # ---- Augmentation (data/mapper.py); flips and crop size are Detectron2's INPUT.RANDOM_FLIP and INPUT.CROP -----
    # Not ours: the shorter side of training images before the random scale; Detectron2 presets (800,), here images keep
    # their size. INPUT.MAX_SIZE_TRAIN limits the longer side. INPUT.MIN_SIZE_TRAIN_SAMPLING: "choice", "range", or
    # "per_dataset": one length per entry of DATASETS.TRAIN.
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    # (low, high) or (low, high, step) of the random scale; step > 0 draws from the grid low, low + step, ..., high.
    cfg.INPUT.SCALE_RANGE = (0.5, 2.0)
    # A crop in which one class holds more than this share of the labelled pixels is drawn again (10 tries); 1 = off.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Strength of brightness, contrast and saturation jitter, in [0, 1); 0 = off.
    cfg.INPUT.COLOR_JITTER = 0.0
    # Largest angle of the random rotation in degrees; 0 = off.
    cfg.INPUT.ROTATION = 0.0
    # Largest radius in pixels of the Gaussian blur that every second image gets (radius 0 to BLUR); 0 = off.
    cfg.INPUT.BLUR = 0


def _add_model(cfg: CN) -> None:
    # ---- Model ---------------------------------------------------------------------------------------------------
    # Output stride of build_dilated_resnet_backbone and build_deep_stem_resnet_backbone (three 3x3 convolutions instead
    # of one 7x7, as PSPNet has): 8 (stages 4 and 5 dilated) or 16 (stage 5 dilated) or 32 (none).
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 8
    # build_timm_backbone: a network of the timm library by its name there; weights come by MODEL.WEIGHTS.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    # Stride of its deepest feature: 32, or 16 or 8 where timm offers it for the network.
    cfg.MODEL.TIMM.OUTPUT_STRIDE = 32
    # Batch norm per dataset (CDCL's dataset-aware block) for the whole model. What datasets share all the same stands
    # behind the norm's name in MODEL.RESNETS.NORM (backbone) and MODEL.SEM_SEG_HEAD.NORM: "BN/shared_affine" = one
    # scale and shift, statistics per dataset; "BN/shared" = one norm. ("BN/momentum=0.01": share of a batch in the
    # running statistics, 0.1 where nothing is said.)
    cfg.MODEL.DATASET_NORM = CN()
    cfg.MODEL.DATASET_NORM.ENABLED = False
    # Name of the trained dataset whose branches initialise those of datasets that the loaded checkpoint does not know
    # (their classifiers start anew); "" = such a dataset is an error.
    cfg.MODEL.DATASET_NORM.INIT_FROM = ""
    # Which branch an unseen dataset uses at test time: "error", "nearest", "average", "reestimate", or the name of a
    # trained dataset.
    cfg.MODEL.DATASET_NORM.UNSEEN = "error"

    # Decay of the running mean of the weights, which is then what is evaluated; 0 = off.
    cfg.MODEL.EMA_DECAY = 0.0


def _add_head(cfg: CN) -> None:
    # Decoder shared by all datasets, by registered name: PSPDecoder, DeepLabV3PlusDecoder, FPNDecoder, ConcatDecoder.
    # Its width is Detectron2's MODEL.SEM_SEG_HEAD.CONVS_DIM.
    cfg.MODEL.SEM_SEG_HEAD.DECODER = "PSPDecoder"
    # HierarchicalHead: file of the tree (tools/hierarchy.py writes one to be edited); "" = built from the label spaces.
    cfg.MODEL.SEM_SEG_HEAD.HIERARCHY = ""
    # Loss of the head, "" = its first. UnifiedHead: "null_bce", "relational_bce" (UniSeg), "bce", "cross_entropy".
    # HierarchicalHead: "iv2019" (shares of boxes, shared means), "iv2018" (hard boxes, means of their own);
    # "iv2019_separate_norm" and "iv2018_shared_norm" have the other's means.
    # EntropyHead: "entropy"; "entropy_shared" and "entropy_confident" keep classes that only one dataset has out of the
    # cross-dataset term, by the taxonomy or by the entropy of the pixel (heads/entropy.py).
    cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE = ""
    # Factor of a cosine. UnifiedHead: classifier (UniSeg's second stage: 20); 0 = a linear one. EntropyHead: similarity
    # of pixel and prototype; 0 = dot product, as in USSS.
    cfg.MODEL.SEM_SEG_HEAD.COSINE_SCALE = 0.0
    # What a head knows of the classes before the first step. Relations of "relational_bce": "" = measured on
    # DATASETS.TRAIN with the weights that training starts from, a checkpoint = measured with its weights, a file of
    # responses (.npz), "taxonomy", or "none". Prototypes of EntropyHead: "" or a checkpoint = measured likewise, a file
    # of prototypes (.npz; tools/prototypes.py makes one of any size), or "random".
    cfg.MODEL.SEM_SEG_HEAD.CLASS_STATISTICS = ""
    # EntropyHead: weights (alpha, beta) of the entropy over the other datasets' classes and over an image's own.
    cfg.MODEL.SEM_SEG_HEAD.ENTROPY_WEIGHTS = (1.0, 1.0)
    # Dropout before the classifiers.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # Weight of the auxiliary loss on res4 (deep supervision); 0 builds no auxiliary head.
    cfg.MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT = 0.4
    # Weights w^i of the datasets' losses, in the order of DATASETS.TRAIN; empty = 1 for all.
    cfg.MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS = ()
    # Whether datasets with equal class lists (Cityscapes and BDD100K) share one classifier. CDCL does not say.
    cfg.MODEL.SEM_SEG_HEAD.SHARE_CLASSIFIERS = False


def _add_training(cfg: CN) -> None:
    # ---- Training (engine/) --------------------------------------------------------------------------------------
    # Not ours: Detectron2 0.5 presets 1e-4 whatever SOLVER.WEIGHT_DECAY is; None follows it, as Detectron2 0.6 does.
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None
    # "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Exponent of WarmupPolyLR, one of SOLVER.LR_SCHEDULER_NAME's values beside Detectron2's own.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Learning-rate factor of everything that is not the backbone.
    cfg.SOLVER.HEAD_LR_FACTOR = 1.0
    # "bfloat16" or "float16"; switched on by Detectron2's SOLVER.AMP.ENABLED, on CPU and GPU.
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    # "fused": one pass over all datasets of a step; "sequential": one pass per dataset, gradients accumulated (same
    # gradients, less memory); "per_entry": one pass per entry of DATASETS.TRAIN, unlabelled ones in chunks of
    # IMS_PER_BATCH images.
    cfg.SOLVER.STEP_MODE = "fused"

    # ---- Self-training (engine/self_training/): labelled and unlabelled entries stand in DATASETS.TRAIN ------------
    cfg.SELF_TRAINING = CN()
    # Number of rounds, which share SOLVER.MAX_ITER equally; 0 = no self-training.
    cfg.SELF_TRAINING.ROUNDS = 0
    # "class_balanced" (CBST), "global" (one threshold for all classes), "spatial_prior" (CBST-SP); "online": a teacher
    # (MODEL.EMA_DECAY) labels in every step, and classes of the source are mixed into the target; "consistency": a
    # teacher labels in every step, and a disturbed view of the image learns what it is sure of.
    cfg.SELF_TRAINING.POLICY = "class_balanced"
    # Share of the target's pixels of each class that is labelled: (first round, growth per round, maximum).
    cfg.SELF_TRAINING.PORTION = (0.2, 0.05, 0.5)
    # Share of the source's images that a round trains on, likewise; larger shares hold the smaller ones.
    cfg.SELF_TRAINING.SOURCE_PORTION = (1.0, 0.0, 1.0)
    # Share of the target's images that is labelled, the most confident ones, likewise.
    cfg.SELF_TRAINING.TARGET_PORTION = (1.0, 0.0, 1.0)
    # CRST's regulariser and its weight: ("lrent", 0.25) softens labels; ("mrkld" | "mrent" | "mrl2", 0.1) adds a loss.
    cfg.SELF_TRAINING.REGULARIZER = ("none", 0.0)
    # Crops around rare classes, with POLICY online source images that have them: (probability, share of the predictions
    # below which a class is rare, number of the rarest classes that count where none is below it).
    cfg.SELF_TRAINING.MINING = (0.0, 0.001, 3)
    # "spatial_prior" only: file made by tools/spatial_prior.py.
    cfg.SELF_TRAINING.PRIOR = ""
    # Whether images that DATASETS.TEST scores may be labelled.
    cfg.SELF_TRAINING.LABEL_SCORED = False


def _add_test(cfg: CN) -> None:
    # ---- Test (evaluation/) --------------------------------------------------------------------------------------
    # Scales of the multi-scale test, switched on by Detectron2's TEST.AUG.ENABLED; TEST.AUG.FLIP adds mirrored images.
    cfg.TEST.AUG.SCALES = (1.0,)
    # (height, width) of the sliding window, which moves by two thirds of its size; (0, 0) = whole images.
    cfg.TEST.SLIDING_WINDOW = (0, 0)
    # Metric by which weights/best.pth is kept, as metrics.json names it (camvid_val/sem_seg/mIoU); "" = none.
    cfg.TEST.BEST_METRIC = ""
    # Pictures (image | ground truth | prediction | errors) per dataset in an evaluation, as files and in TensorBoard.
    cfg.TEST.NUM_PICTURES = 4
    # Not ours: Detectron2 shows none (0). Steps between pictures of the training batch in TensorBoard, one per dataset;
    # those of the last step are shown in any case.
    cfg.VIS_PERIOD = 500
