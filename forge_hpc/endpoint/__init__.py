"""An OpenAI-compatible address at which the policy answers while it is trained, and a record of what it sampled."""

from forge_hpc.endpoint.conversations import Conversations
from forge_hpc.endpoint.episode import EndpointEpisode
from forge_hpc.endpoint.requests import Refused
from forge_hpc.endpoint.sampler import GeneratorSampler, Sampler
from forge_hpc.endpoint.server import Endpoint, tls_context

__all__ = ["Conversations", "Endpoint", "EndpointEpisode", "GeneratorSampler", "Refused", "Sampler", "tls_context"]
