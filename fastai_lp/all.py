"What a user types: `from fastai_lp.all import *`, after `from fastai.vision.all import *`"
from fastai_lp.estimator import LabelDiffusion
from fastai_lp.interpret import LPInterpretation
from fastai_lp.label_studio import labels_from_label_studio
from fastai_lp.learner.augment import Cutout, OnUnlabeled, RandomAffine, strong_tfms
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock, is_unlabeled
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.fixmatch import FixMatchCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.layers import L2Linear, RawInput, Thumbnail, add_l2norm, find_feature_layer
from fastai_lp.learner.losses import PseudoLabelLoss
from fastai_lp.learner.mean_teacher import MeanTeacherCallback, teacher_in_place
from fastai_lp.learner.mixing import StreamMixUp
from fastai_lp.learner.record import LPRecord
from fastai_lp.learner.relabel import relabel
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.learner.splitting import LabeledOnlySplitter, hide_labels
from fastai_lp.learner.streams import TwoStream, semi_dls, two_stream
from fastai_lp.transductive.advice import peak_memory
from fastai_lp.transductive.balance import class_prior
from fastai_lp.transductive.curation import familiarity, label_issues, suggest
from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.ensemble import Ensemble
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction
from fastai_lp.transductive.neighbors import default_k, knn, knn_recall
from fastai_lp.transductive.propagate import propagate, seed_matrix, spread
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.transductive.scoring import certainty, class_weights

__all__ = [
    # in a Learner
    'LPCallback', 'Extractor', 'Diffusion', 'NetworkPrediction', 'GTG', 'Ensemble', 'MeanTeacherCallback', 'teacher_in_place',
    'FixMatchCallback', 'ResumeCallback', 'LPRecord', 'PseudoLabelLoss', 'L2Linear', 'RawInput', 'Thumbnail', 'add_l2norm',
    'find_feature_layer',
    # data
    'SemiCategorize', 'SemiCategoryBlock', 'SemiImageDataLoaders', 'TwoStream', 'semi_dls', 'two_stream', 'relabel', 'hide_labels',
    'LabeledOnlySplitter', 'is_unlabeled', 'strong_tfms', 'RandomAffine', 'Cutout', 'OnUnlabeled', 'StreamMixUp',
    # after a fit, or without a network
    'LPInterpretation', 'labels_from_label_studio', 'suggest', 'label_issues', 'familiarity', 'LabelDiffusion',
    # the transductive step
    'propagate', 'PseudoLabels', 'knn', 'knn_recall', 'default_k', 'affinity', 'normalize', 'diffuse', 'spread', 'seed_matrix',
    'certainty', 'class_weights', 'class_prior', 'peak_memory']
