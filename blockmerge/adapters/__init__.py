"""Files that change a model: LoRA and its relatives. What their modules are called and mean, of which kinds they
are, and how much of each goes to which block. No torch.
"""

from blockmerge.adapters.targets import Target, Whereabouts, spellings_of, targets_of

__all__ = ["Target", "Whereabouts", "spellings_of", "targets_of"]
