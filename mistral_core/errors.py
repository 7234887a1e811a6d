"""The error tree: every error of this project is a `MistralError` and the closest builtin too.

Each message names the file, tensor or argument, what it must be, what was found, and one thing to do.
"""

from __future__ import annotations

from .telling import printable


class MistralError(Exception):
    """Base of every error this project raises on purpose; whatever its text quotes, no terminal obeys it."""

    def __str__(self) -> str:
        return printable(super().__str__())


# Config


class ConfigError(MistralError, ValueError):
    """A config file or field is malformed or inconsistent."""


class UnknownFieldError(ConfigError):
    """A config holds a key that no dialect knows, and `strict=True` was asked for."""


class FrozenConfigError(ConfigError, AttributeError):
    """A field of a config was assigned or deleted, and a config is a value."""


class MeshError(ConfigError):
    """A model cannot be cut over a mesh of devices as asked."""


class UnsupportedFeatureError(ConfigError):
    """A config or file asks for something that is not a dense Mistral."""


# Checkpoints


class CheckpointError(MistralError, OSError):
    """A checkpoint cannot be read or written."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint, or not the file asked for, at this path."""


class CorruptCheckpointError(CheckpointError):
    """The bytes of a checkpoint do not say what they should."""


class TruncatedFileError(CorruptCheckpointError):
    """A file ends before its header says it does."""


class ChecksumMismatchError(CorruptCheckpointError):
    """A file or tensor differs from the SHA-256 in its manifest."""


class CheckpointIndexError(CorruptCheckpointError):
    """`*.index.json` is malformed or disagrees with its shards."""


class ShardMissingError(CorruptCheckpointError):
    """Shards that the index names are not there."""


class UnsafeFileError(CheckpointError):
    """A file would have to be trusted with code, a path or a device: refused."""


class LimitExceededError(CheckpointError):
    """A file asks for more than the documented limits."""


class TensorMismatchError(CheckpointError, ValueError):
    """The tensors of a file are not the tensors of the model."""


class MissingTensorsError(TensorMismatchError):
    """Tensors the model needs are not in the file."""


class UnexpectedTensorsError(TensorMismatchError):
    """The file holds tensors the model has no place for."""


class ShapeMismatchError(TensorMismatchError):
    """Tensors have other shapes than the config says."""


class DtypeMismatchError(TensorMismatchError):
    """Tensors have a dtype that cannot be taken as weights."""


class NonFiniteWeightsError(CheckpointError, ValueError):
    """Weights hold NaN or infinity."""


# Writing and conversion


class ConversionError(MistralError):
    """A checkpoint cannot be written as asked."""


class OutputExistsError(ConversionError, FileExistsError):
    """The output is already there and `overwrite` was not asked for."""


class OutputBusyError(ConversionError):
    """Another process is writing the same output."""


class NoSpaceError(ConversionError, OSError):
    """The disk, the quota or the file size limit is full; `errno` is kept."""


class LossyConversionError(ConversionError, ValueError):
    """Values would change and `allow_lossy` was not asked for."""


# Inputs of a model


class InputError(MistralError, ValueError):
    """An argument of a model call is malformed."""


class UnknownArgumentError(InputError, TypeError):
    """An argument that a model does not have."""


class TokenIdError(InputError, IndexError):
    """A token id (or label) is not an integer in [0, vocab_size)."""


class MaskError(InputError):
    """An attention mask is not [B, T] of zeros and ones, or contradicts the cache."""


class PositionError(InputError, IndexError):
    """Position ids are malformed or out of range."""


class SequenceTooLongError(InputError):
    """More positions than `max_position_embeddings`."""


class CacheOverflowError(InputError, OverflowError):
    """The KV cache has no room for the new tokens; it is unchanged."""


class EmptyInputError(InputError):
    """A batch, sequence or row without a single token."""


class NonFiniteInputError(InputError):
    """Embeddings or logits hold NaN or infinity."""


class GenerationConfigError(MistralError, ValueError):
    """A generation option has a value that means nothing."""


# Text


class TokenizerError(MistralError, ValueError):
    """A tokenizer file or its input is malformed."""


class TemplateError(MistralError, ValueError):
    """A chat template failed."""


class TemplateSecurityError(TemplateError):
    """A chat template tried to leave its sandbox."""


class TemplateTimeoutError(TemplateError, TimeoutError):
    """A chat template ran out of its time."""


# Examples to learn from


class ExampleError(InputError):
    """A line of a file of examples is not what is learnt from; the message begins with the file and the line."""


class ExampleChatError(ExampleError, TemplateError):
    """The messages of an example are no conversation that the tokenizer writes, or not one to learn from."""


class ExampleLabelError(ExampleError, TokenIdError):
    """A label of an example is none of the classes."""


class MissingLabelsError(ExampleError, EmptyInputError):
    """An example has nothing in it that could be learnt."""


class NonFiniteLossError(MistralError, ArithmeticError):
    """A loss or the gradients of a step in training are no finite numbers; nothing was learnt from them."""


# Hub


class HubError(MistralError, OSError):
    """The model hub did not deliver."""


class RepoNotFoundError(HubError, FileNotFoundError):
    """No such repository or revision, or it is private."""


class AuthRequiredError(HubError, PermissionError):
    """The repository is gated or private and the token does not open it."""


class FileNotOnHubError(HubError, FileNotFoundError):
    """The repository has no such file."""


class OfflineError(HubError, ConnectionError):
    """The hub cannot be reached, or offline mode is on, and the cache lacks the files."""


class HubTimeoutError(HubError, TimeoutError):
    """The hub did not answer in time."""


class DownloadCorruptError(HubError):
    """A download is not what the hub announced."""


# Packages


class MissingNameError(MistralError, ImportError):
    """A name of transformers that does not exist here; the message says what to use instead."""


class MissingExtraError(MistralError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
