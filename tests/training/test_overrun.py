import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_prune.training.overrun import Overrun


def test_it_stays_where_it_was():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    run = Overrun.of(TrainerState(global_step=7, epoch=1.5, num_input_tokens_seen=40), model)

    with torch.no_grad():
        model.weight.add_(1)
    state, control = TrainerState(global_step=8, epoch=1.7, num_input_tokens_seen=48), TrainerControl()
    control.should_log = control.should_evaluate = control.should_save = True
    run.stay_over_(state, control)
    assert (state.global_step, state.epoch, state.num_input_tokens_seen) == (7, 1.5, 40)
    assert (control.should_log, control.should_evaluate, control.should_save) == (False, False, False)
    assert control.should_training_stop
    run.weights.restore_(model)
    assert torch.equal(model.weight, before)
