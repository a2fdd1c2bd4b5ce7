"""Callbacks: what happens around updates."""

from engine.callbacks.accumulation import GradientAccumulationScheduler as GradientAccumulationScheduler
from engine.callbacks.base import Callback as Callback
from engine.callbacks.early_stopping import EarlyStopping as EarlyStopping
from engine.callbacks.ema import EMA as EMA
from engine.callbacks.learning_rate import EpochLR as EpochLR
from engine.callbacks.learning_rate import PlateauLR as PlateauLR
from engine.callbacks.noise_scale import NoiseScale as NoiseScale
from engine.callbacks.pretrained import SavePretrained as SavePretrained
from engine.callbacks.profiler import Profiler as Profiler
from engine.callbacks.progress import Progress as Progress
