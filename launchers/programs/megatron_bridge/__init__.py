"""Trains a recipe of Megatron Bridge under the layout of a trial, by Bridge's own `pretrain`; and reads recipes."""
