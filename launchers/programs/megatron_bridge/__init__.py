"""Trains a recipe of Megatron Bridge with the layout of a trial, by Bridge's own `pretrain`; and reads recipes."""
