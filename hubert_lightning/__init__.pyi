from .asr.align import align as align
from .asr.score import score as score
from .asr.speakers import SpeakerTurn as SpeakerTurn
from .asr.subtitles import SubtitleStyle as SubtitleStyle
from .asr.transcriber import Transcriber as Transcriber
from .asr.transcript_formats import Transcript as Transcript
from .asr.word_times import Word as Word
from .hub import CardFacts as CardFacts
from .model.config import EncoderConfig as EncoderConfig
from .model.hubert import HubertEncoder as HubertEncoder
from .pretrained.load import load_encoder as load_encoder
from .training.callbacks.best_checkpoints import BestCheckpoints as BestCheckpoints
from .training.callbacks.layer_quality import LayerQuality as LayerQuality
from .training.callbacks.peak_rate import PeakRateFinder as PeakRateFinder
from .training.callbacks.pictures import Pictures as Pictures
from .training.distributed import LayerwiseFSDP as LayerwiseFSDP
from .training.finetuning import CTCFinetuning as CTCFinetuning
from .training.finetuning_data import TranscribedData as TranscribedData
from .training.pretraining import HubertPretraining as HubertPretraining
from .training.pretraining_data import PretrainingData as PretrainingData
from .training.relabelling import Relabel as Relabel
from .units.kmeans import KMeans as KMeans
from .units.kmeans import ScikitKMeans as ScikitKMeans
from .units.unit_extractor import Units as Units

__version__: str
