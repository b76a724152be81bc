"""The networks that a recipe starts from: copies of a teacher or student, or newly initialised ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, UNet2DModel
from torch import nn

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange, middle
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import ConditionTable, embeds_guidance, for_scales, guidance_of, of_classes
from distill.flow.interpolants import Interpolant, linear
from distill.flow.times import uniform_grid
from distill.networks.acceleration import AccelerationStudent
from distill.networks.architectures import (
    EDM,
    NETWORKS,
    accelerated,
    build,
    kind_of,
    policy_of,
    two_times,
    with_guidance,
    with_outputs,
)
from distill.networks.critic import Critic
from distill.networks.flow_map import FlowMapStudent
from distill.networks.policies import outputs_of
from distill.networks.policy import PolicyStudent
from distill.networks.velocity import TIME_SCALE, VelocityStudent
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.protocols import Codec, Cond
from distill.spec.kinds import STUDENTS
from distill.spec.model import NetworkSpec
from distill.students import native, smaller
from distill.students.loaded import LoadedStudent
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField, LinearCall, NetworkField, VeField


class StudentInit:
    """Makes the networks of a recipe. Implements `protocols.Init`.

    source: the network to copy, unless `network` is given.
    network: describes a new network; its weights depend on `seed`.
    shape, num_classes: of the training samples.
    teacher: the critic starts from its weights, if it has any, whatever the student starts from.
    dropout: dropout probability of a copied network; None: as in the source.
    shares: the networks share the frozen weights of the teacher, or of the source; see `adapting.trained`, which makes
    them trainable. InputError if the source is not the network of a latent-space pipeline.
    changes: to the config of the source's network, for a student of another size; see `smaller.of`.
    guidance_range: of the guidance scales that the networks take as an input; None: as in the source. InputError for
    networks that cannot take one.

    The attributes `num_classes` and `null_class` are those of the networks made here. A new network has the classes of
    the teacher, or of the samples if there is no teacher; with K classes its null class is K. A copied network must
    have the same classes, except that without a teacher an unconditional one may be trained on labelled samples.
    InputError otherwise.
    """

    def __init__(
        self,
        source: LoadedTeacher | LoadedStudent | None,
        network: NetworkSpec | None,
        shape: tuple[int, ...],
        num_classes: int | None,
        seed: int,
        teacher: LoadedTeacher | None = None,
        dropout: float | None = None,
        *,
        shares: bool = False,
        changes: Mapping[str, object] | None = None,
        guidance_range: GuidanceRange | None = None,
    ) -> None:
        self.shares = shares
        self.source, self.network, self.shape, self.seed, self.teacher = source, network, shape, seed, teacher
        self.changes = changes
        self.dropout, self.packaging = dropout, None if source is None else source.packaging
        self.codec: Codec = next((each.codec for each in (teacher, source) if each is not None), PIXELS)
        shown = num_classes if teacher is None else teacher.num_classes
        self.num_classes: int | None = shown
        self.null_class: int | None = shown
        if network is not None and teacher is not None and isinstance(teacher.given, ConditionTable):
            raise InputError(
                f"network: {teacher.description} is conditioned on more than class labels, which a new network does "
                "not take; leave it out, to start from the teacher's weights"
            )
        custom = None if teacher is None else teacher.given
        self.conditioning = custom or of_classes(shown, shown)
        if network is not None:
            self.conditioning = for_scales(self.conditioning, guidance_range)
            return
        if source is None or source.network is None:
            given = "no teacher or init is given" if source is None else f"{source.description} has no network"
            raise InputError(f"{given}, so there are no weights to start from; describe a new network in `network`")
        if shares and not native.is_native(source.network):
            raise InputError(
                f"lora: {source.description} is not the network of a latent-space pipeline, and others cannot have "
                "adapters; remove lora, so that it is trained in full"
            )
        self.num_classes, self.null_class = source.num_classes, source.null_class
        self.conditioning = source.conditioning
        if source.num_classes != shown and not (source.num_classes is None and teacher is None):
            if isinstance(self.conditioning, ConditionTable):
                other = "the data" if teacher is None else "the teacher"
                raise InputError(
                    f"{source.description} has {source.num_classes} conditions, the rows of its file of "
                    f"teacher.conditions, but {other} has {shown or 'none'}; start from a network with the same "
                    "conditions"
                )
            whose = "the data has" if teacher is None else "the teacher has"
            raise InputError(
                f"{source.description} has {source.num_classes or 'no'} classes, but {whose} {shown or 'none'}; start "
                "from a network with the same classes, or from a new `network`"
            )
        self.conditioning = for_scales(self.conditioning, guidance_range)
        if self.packaging is not None and self.guidance_range is not None and embeds_guidance(self.conditioning):
            self.packaging = replace(self.packaging, embedded_guidance=middle(self.guidance_range))

    @property
    def guidance_range(self) -> GuidanceRange | None:
        """The range of guidance scales that the networks take as an input; None: they take none."""
        return guidance_of(self.conditioning)

    @property
    def _new_range(self) -> GuidanceRange | None:
        """The range of guidance scales, if networks do not take them by themselves."""
        return None if embeds_guidance(self.conditioning) else self.guidance_range

    def _with_guidance(self, network: ModelMixin) -> ModelMixin:
        """The network with the guidance scale as an input, if the networks of this stage take it."""
        if self.guidance_range is None or network.config.get("guidance_range") is not None:
            return network
        return with_guidance(network, self.guidance_range, self.seed)

    @property
    def is_native(self) -> bool:
        """Whether the networks keep the class of a latent-space pipeline."""
        return self.network is None and self.source is not None and native.is_native(self.source.network)

    @property
    def has_classes(self) -> bool:
        """Whether the networks are conditioned on class labels."""
        return self.num_classes is not None and not isinstance(self.conditioning, ConditionTable)

    def velocity_field(self) -> nn.Module:
        """A trainable VelocityStudent on the linear path. Every call returns the same weights."""
        network = self._network("velocity field")
        if native.is_native(network) and self._new_range is not None:
            raise InputError(f"{native.NO_SCALE}, and this recipe's students have none; {native.OTHER_RECIPE}")
        return native.velocity(network, self._call()) if native.is_native(network) else VelocityStudent(network)

    def flow_map(self, to_data: bool = False) -> nn.Module:
        """A trainable FlowMapStudent on the linear path: a copy of the source if that is a flow map.

        Otherwise its initial output is the velocity of `velocity_field`, for every s.

        to_data: it is only called with s = 0. Then a network of a latent-space pipeline gets no second time, so that
        the pipeline can sample it.
        """
        network = self._network("flow map", "flow_map")
        if native.is_native(network):
            return native.flow_map(network, self._call(), self.seed, to_data, guidance_range=self._new_range)
        return FlowMapStudent(network if kind_of(network) == "flow_map" else two_times(network, self.seed))

    def policy(self, policy: str, count: int, grid: Sequence[float] | None = None, spread: float = 0.0) -> nn.Module:
        """A trainable PolicyStudent on the linear path: a copy of the source if that is one with the same outputs.

        Otherwise each of its outputs starts as the velocity of `velocity_field`, but for noise; see `with_outputs`.
        """
        network = self._network("flow map with several outputs", "flow_map")
        if native.is_native(network):
            raise InputError(native.ONE_OUTPUT)
        if kind_of(network) != "flow_map":
            network = with_outputs(network, policy, count, grid, spread, self.seed)
        if policy_of(network) != (policy, outputs_of(policy, count), None if grid is None else [*grid]):
            raise InputError(
                "the source is a flow map without the outputs that this recipe trains; start from a student of this "
                "recipe with the same options, from a velocity field, or from the teacher"
            )
        return PolicyStudent(network, policy=policy, grid=None if grid is None else torch.tensor(grid).double())

    def acceleration(self) -> nn.Module:
        """A trainable AccelerationStudent: a copy of the source if that is of this kind.

        Otherwise the initial output of both its networks is the velocity of `velocity_field`.
        """
        self._refuse_guidance("a network with an acceleration")
        network = self._network("velocity with its acceleration", "acceleration")
        if native.is_native(network):
            return native.acceleration(network, self._call())
        return AccelerationStudent(network if kind_of(network) == "acceleration" else accelerated(network, self.seed))

    def critic(self) -> nn.Module:
        """A trainable Critic, with a velocity and one logit per sample.

        It starts from the teacher's weights, or from those of `velocity_field` if the teacher has none.
        """
        self._refuse_guidance("a critic")
        if self.teacher is None or self.teacher.network is None:
            if self.network is None and self.source is not None and not _is_field(self.source):
                raise InputError(
                    f"no weights for the critic: the teacher has no network, and {self.source.description} is not a "
                    "velocity field; use a teacher with weights, or a new `network`"
                )
            field = self.velocity_field()
            assert isinstance(field, VelocityStudent)
            if native.is_native(field.network):
                return native.critic(field.network, self._call(), self.seed)
            return Critic(field, self.seed)
        if native.is_native(self.teacher.network):
            network = self._start(self.teacher.network, None)
            return native.critic(network, self._called(native.call_of(self.teacher)), self.seed)
        return Critic(VelocityStudent(_copied(self.teacher, None)), self.seed)

    def _refuse_guidance(self, what: str) -> None:
        if self.guidance_range is not None:
            raise InputError(
                f"{what} cannot take the guidance scale as an input, as the network that this stage starts from does; "
                "start from another student, or from the teacher"
            )

    def t_grid(self, steps: int) -> list[float]:
        """The times [steps + 1] along which a student is sampled; see `protocols.Init`."""
        if self.is_native:
            return self._call().t_grid(steps).tolist()
        return uniform_grid(steps).tolist()

    def _call(self) -> LinearCall:
        """How the network of a source of a latent-space pipeline is called."""
        assert self.source is not None
        return self._called(
            native.call_of(self.source if isinstance(self.source, LoadedTeacher) else self.source.student)
        )

    def _called(self, call: LinearCall) -> LinearCall:
        return call if self.shares else native.in_float32(call)

    def _start(self, network: nn.Module, dropout: float | None) -> nn.Module:
        return (native.on_shared_base if self.shares else native.copied)(network, dropout)

    def _network(self, what: str, kind: str = "velocity") -> nn.Module:
        """A velocity network on the linear path, or a copy of a source that already is of this kind.

        what: the kind in words, for the message of the InputError.
        """
        if self.network is not None:
            return self._with_guidance(build(self.network, self.shape, self.num_classes, self.seed))
        assert self.source is not None
        if not _is_field(self.source) and kind_of(self.source.network) != kind:
            words = STUDENTS[kind_of(self.source.network)].words
            raise InputError(
                f"{self.source.description} is {words}, and a {what} cannot start from its weights; start from a "
                "student of kind velocity, from the teacher, or from a new `network`"
            )
        source = self.source if self.changes is None else smaller.of(self.source, self.changes, self.seed)
        if native.is_native(source.network):
            assert source.network is not None
            if source is not self.source:
                return native.trainable(source.network, self.dropout)
            return self._start(source.network, self.dropout)
        name = type(source.network).__name__
        exported = tuple(each for members in (*NETWORKS.values(), EDM) for each in members)
        if not isinstance(source.network, exported):
            raise InputError(
                f"{source.description}: exporting a student of class {name} is not supported; use a new `network`"
            )
        return self._with_guidance(_copied(source, self.dropout))

    def null(self, cond: Cond) -> Cond:
        """The condition of the unconditional call, for as many rows as `cond`. InputError if the network has none."""
        if not cond:
            return cond
        if not self.conditioning.has_null:
            if isinstance(self.conditioning, ConditionTable):
                raise InputError(
                    "the file of teacher.conditions has no condition for the unconditional call, which label_dropout "
                    "needs; make it again with `distill encode`, or set label_dropout to 0"
                )
            raise InputError(
                "the network has no class id for the unconditional call; set teacher.null_class, or "
                "set label_dropout to 0"
            )
        return self.conditioning.null(cond)


def _is_field(source: LoadedTeacher | LoadedStudent) -> bool:
    """Whether the source is a velocity field; true also if it has no network."""
    return source.network is None or STUDENTS[kind_of(source.network)].is_field


def _copied(source: LoadedTeacher | LoadedStudent, dropout: float | None) -> ModelMixin:
    """A trainable copy in float32 of the source's network, on the linear path. dropout: None keeps the source's."""
    assert source.network is not None
    with init_empty_weights(include_buffers=False):  # all weights are set below
        network = _of_linear_path(source)
        if dropout is not None:
            if "dropout" not in network.config:
                raise InputError(
                    f"dropout: {source.description} is a network without dropout, so this has no effect; remove it"
                )
            network = type(network).from_config(network.config, dropout=dropout)
    weights = {name: tensor.detach().clone() for name, tensor in _weights(source.network).items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.float().to(source.network.device).train()


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a network by their names in the network that `_of_linear_path` makes."""
    prefix = "network." if type(network) in EDM else ""
    return {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}


def teacher_on_linear_path(teacher: LoadedTeacher) -> LoadedTeacher:
    """The teacher as recipes call it: as a velocity network on the linear path, finite at both ends.

    A network of a VP, EDM or VE schedule is converted; it shares the weights of the original. Outside the noise levels
    of its training, the network is given the nearest trained level, while its input is scaled by the true one. For EDM,
    for example, c_noise stays that of sigma 80 from t = 80/81 on.
    """
    if not isinstance(teacher.field, EdmField | NetworkField | VeField) or teacher.field.interpolant.name == "linear":
        return teacher
    assert teacher.network is not None
    if not isinstance(teacher.network, UNet2DModel) and type(teacher.network) not in EDM:
        return native.teacher_on_linear_path(teacher)
    if any(parameter.is_meta for parameter in teacher.network.parameters()):
        raise InputError(
            f"{teacher.description} does not fit into the memory of the device, so its weights cannot be shared with a "
            "network of the linear path; fitted solvers need that: use another solver"
        )
    with init_empty_weights(include_buffers=False):
        network = _of_linear_path(teacher)
    network.load_state_dict(_weights(teacher.network), strict=True, assign=True)
    network.eval().requires_grad_(False)
    return replace(teacher, field=NetworkField(network, linear(), "velocity", TIME_SCALE), network=network)


def _of_linear_path(source: LoadedTeacher | LoadedStudent) -> ModelMixin:
    """A new network with the weight names of `_weights`, called as a network on the linear path.

    It is built from the config instead of copied. All parameters of the source are frozen; in the new network only
    those are frozen that its class freezes. InputError if the source cannot be converted.
    """
    if isinstance(source, LoadedStudent):
        return type(source.network).from_config(source.network.config)
    match source.field:
        case NetworkField(network, Interpolant(name="linear"), "velocity", time_scale, inverted=inverted):
            if time_scale != TIME_SCALE:
                raise InputError(
                    f"{source.description} was trained with num_train_timesteps={time_scale:g}, but students on the "
                    f"linear path use {TIME_SCALE:g}; start from a new `network`"
                )
            if inverted:
                return VelocityUNet2DModel.from_config(network.config, path="inverted", prediction="velocity")
            return type(network).from_config(network.config)
        case NetworkField(network, path, prediction, last) if isinstance(network, UNet2DModel):
            n = torch.arange(int(last) + 1, dtype=torch.float64, device="cpu")
            table = path.path(n / last).alpha.square()  # alphas_cumprod [N]
            return VelocityUNet2DModel.from_config(
                network.config, path="vp", prediction=prediction, alphas_cumprod=table.tolist()
            )
        case EdmField(network, sigma_data, sign, t_range) if isinstance(network, UNet2DModel):
            sigma_min, sigma_max = (t / (1 - t) for t in t_range)
            return VelocityUNet2DModel.from_config(
                network.config,
                path="edm",
                prediction="epsilon" if sign > 0 else "v_prediction",
                sigma_data=sigma_data,
                sigma_min=sigma_min,
                sigma_max=sigma_max,
            )
        case EdmField(network, sigma_data, sign, t_range) if type(network) in EDM:
            sigma_min, sigma_max = (t / (1 - t) for t in t_range)
            classes = network.config.num_classes
            options = {name: each for name, each in network.config.items() if name != "num_classes"}
            return VelocityEdmUNet2DModel.from_config(
                options,
                num_class_embeds=None if classes is None else classes + 1,
                design=EDM[type(network)],
                sign=round(sign),
                sigma_data=sigma_data,
                sigma_min=sigma_min,
                sigma_max=sigma_max,
            )
        case VeField(network):
            sigma_min, sigma_max = source.field.sigmas
            return VelocityUNet2DModel.from_config(
                network.config, path="ve", prediction="score", sigma_min=sigma_min, sigma_max=sigma_max
            )
        case _:
            raise InputError(
                f"neither a student nor a critic can start from the weights of {source.description}; use a new "
                "`network`, and a recipe without a critic"
            )
