"""Checkpoints of a run: written whole and beside the training, read back onto any mesh."""

import contextlib
import logging
import math
import re
import warnings
from typing import Any

import jax

from freqkv_jax.sharding import tree_path, wait_for_all

ITEM, ABOUT = "state", "about"
# What the libraries below say of a folder that may be whole all the same: the machine or the
# storage failed. (Theirs are mostly ValueErrors.) 2 and 20: no such file, no such folder.
PASSING = re.compile(
    r"RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|CANCELLED"
    r"|ABORTED|OS error (?!2:|20:)\d"
)
OTHER_ARRAYS = re.compile(r"tree structures do not match|not compatible with the stored shape")


class SaveError(OSError):
    """A checkpoint could not be written (a full disk, say); earlier ones are whole."""


class ReadError(OSError):
    """A checkpoint could not be read now (a time-out, no memory), though it may be whole."""


class Checkpoints:
    """The checkpoints in one folder, each a sub-folder named after its step.

    Every process of a run makes one and calls the same methods in the same order.
    """

    def __init__(self, folder: Any, keep: int, keep_best: bool = False) -> None:
        """Args: keep: so many of the latest stay. keep_best: also the one of the best score."""
        import orbax.checkpoint as ocp
        from etils import epath

        for name in ("absl", "asyncio"):  # pages of remarks; errors are raised here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder, self.keep, self.keep_best = epath.Path(folder), keep, keep_best
        self._ocp = ocp
        self._scores: dict[int, float] = {}
        self._saving, self._failed = 0, False
        # Orbax would choose what to delete before the new checkpoint is whole: `_prune` does not.
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.preservation_policy.PreserveAll(),
                create=True,
                cleanup_tmp_directories=True,
            ),
            item_names=(ITEM, ABOUT),
        )

    def steps(self) -> list[int]:
        """Steps of the checkpoints, torn ones too, in rising order."""
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster asks to stop; the same answer at the same step on every host."""
        return self._manager.reached_preemption(step)

    def save(
        self, step: int, state: Any, about: dict[str, Any], score: float | None = None
    ) -> None:
        """Begins to save; arrays are copied before it returns, so `state` may be donated.

        Args:
          about: plain data to be found beside the arrays.
          score: lower is better; None: unknown, never the best.

        Raises:
          SaveError: this or the save before it could not be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        args = self._ocp.args.Composite(
            **{
                ITEM: self._ocp.args.StandardSave(flat(state)),
                ABOUT: self._ocp.args.JsonSave(about | {"score": score}),
            }
        )
        self._saving = step
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._save_error(error) from error
        self._scores[step] = math.inf if score is None else score

    def wait(self) -> None:
        """Waits until the save that is under way is whole, then deletes what is too old.

        Raises SaveError.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._save_error(error) from error
        self._prune()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The latest checkpoint that is whole: arrays as `like` and its `about`; None: no such.

        A torn checkpoint is skipped with a warning and moved aside, never deleted.

        Args:
          like: tree of arrays or ShapeDtypeStructs with the shardings to restore onto.

        Raises:
          ReadError: memory or storage failed, so that nothing is known of the checkpoint.
          ValueError: several checkpoints, and none can be read; or one of other arrays.
        """
        wanted = flat(jax.tree.map(_abstract, like))
        args = self._ocp.args.Composite(
            **{
                ITEM: self._ocp.args.StandardRestore(wanted),
                ABOUT: self._ocp.args.JsonRestore(),
            }
        )
        torn: list[tuple[int, Exception]] = []
        for step in reversed(self.steps()):
            try:
                got = self._manager.restore(step, args=args)
                about = dict(got[ABOUT])
            except Exception as error:  # a torn folder fails in many ways
                self._check_torn(step, error)
                torn.append((step, error))
                continue
            self._set_aside(torn)
            tree = jax.tree.structure(like)
            state = jax.tree.unflatten(tree, [got[ITEM][name] for name in wanted])
            return state, about
        if len(torn) > 1:
            raise ValueError(
                f"none of the {len(torn)} checkpoints in {self.folder} can be read; the latest,"
                f" step {torn[0][0]}: {_first_line(torn[0][1])}. Were they written by another"
                " version of jax or orbax? To begin anew, choose another run.dir"
            )
        self._set_aside(torn)
        return None

    def close(self) -> None:
        """Waits and ends; SaveError if the last save failed and that was not said yet."""
        if self._failed:
            with contextlib.suppress(Exception):
                self._manager.close()
            return
        try:
            self.wait()
        finally:
            self._manager.close()

    def _prune(self) -> None:
        steps = self.steps()
        kept = set(steps[-self.keep :])
        if self.keep_best and steps:
            best = min(steps, key=self._score)  # the earliest of equals
            kept |= {best} if self._score(best) < math.inf else set()
        for step in steps:
            if step not in kept:
                self._manager.delete(step)

    def _score(self, step: int) -> float:
        if step not in self._scores:
            try:
                args = self._ocp.args.Composite(**{ABOUT: self._ocp.args.JsonRestore()})
                score = self._manager.restore(step, args=args)[ABOUT]["score"]
            except Exception as error:  # torn: never the best
                self._check_torn(step, error)
                score = None
            self._scores[step] = math.inf if score is None else score
        return self._scores[step]

    def _check_torn(self, step: int, error: Exception) -> None:
        """Raises ReadError or ValueError unless the error speaks of a folder that is damaged."""
        chain = _chain(error)
        if any(_is_passing(one) for one in chain):
            raise ReadError(
                f"the checkpoint of step {step} in {self.folder} could not be read"
                f" ({_first_line(chain[-1])}); it is left as it is. Run the same command again when"
                " memory and storage allow"
            ) from error
        if any(OTHER_ARRAYS.search(str(one)) for one in chain):
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} holds other arrays than this run"
                f" needs ({_first_line(error)}); it was written by another version. Go on with that"
                " one, or choose another run.dir"
            ) from error

    def _set_aside(self, torn: list[tuple[int, Exception]]) -> None:
        for step, error in torn:
            place = self.folder / f"torn-{step}"
            warnings.warn(
                f"the checkpoint of step {step} is torn and skipped ({_first_line(error)}); it is"
                f" kept as {place}"
            )
            if jax.process_index() == 0:
                if place.exists():
                    place.rmtree()
                (self.folder / str(step)).rename(place)
        if torn:
            wait_for_all("checkpoint.set_aside")
            self._manager.reload()

    def _save_error(self, error: Exception) -> SaveError:
        self._failed = True
        whole = [step for step in self.steps() if step != self._saving]
        left = f"that of step {whole[-1]} is whole" if whole else "there is no earlier one"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return SaveError(
            f"the checkpoint of step {self._saving} could not be written to {self.folder}"
            f" (...{reason[0][-120:]}); {left}. Free some space, then run the same command again"
        )


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, so that a checkpoint does not depend on the classes that held them."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tree_path(path).replace("/", "."): leaf for path, leaf in pairs}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the first cause last."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return isinstance(error, MemoryError) or bool(PASSING.search(str(error)))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
