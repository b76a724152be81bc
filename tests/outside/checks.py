"""How somebody else's package is tested: this file, by pytest."""

import pytest

from distill import testing
from distill.testing import exact


def no_loss_at_the_teacher():
    import outside_velocity as module

    recipe = module.Recipe(module.Config(), exact.teacher(exact.FIELD))
    nets = exact.nets(recipe, exact.Given(exact.Network(exact.FIELD)))
    assert recipe.loss(nets, exact.batch(64), exact.context(64)).total == 0


SUBJECT = testing.Subject("outside/velocity", closed_form=(no_loss_at_the_teacher,))


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_recipe(check, tmp_path):
    check(SUBJECT, tmp_path)


def test_two_processes_agree_with_one(tmp_path):
    testing.agrees(SUBJECT, testing.train_together([SUBJECT], tmp_path / "pair"))
