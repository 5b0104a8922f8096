"`from fastai_lp.all import *`, after `from fastai.vision.all import *`: all that a notebook needs. Written by hand."
from fastai_lp.search import *
from fastai_lp.warm import *
from fastai_lp.graph import *
from fastai_lp.diffusion import *
from fastai_lp.pseudo import *
from fastai_lp.labelers import *
from fastai_lp.curation import *
from fastai_lp.losses import *
from fastai_lp.data import *
from fastai_lp.features import *
from fastai_lp.scoped import *
from fastai_lp.callback import *
from fastai_lp.mean_teacher import *
from fastai_lp.resume import *
from fastai_lp.models import *
from fastai_lp.interpret import *
from fastai_lp.estimator import *
