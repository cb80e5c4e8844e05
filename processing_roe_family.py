"""Processors of RoE on LLaVA-NeXT and LLaVA-OneVision. ViP-LLaVA's is LLaVA's, so `RoeLlavaProcessor` serves it."""

from transformers import LlavaNextConfig, LlavaNextProcessor, LlavaOnevisionConfig, LlavaOnevisionProcessor

from .processing_roe import RoutedProcessor


class RoeLlavaNextProcessor(RoutedProcessor, LlavaNextProcessor):
    """`LlavaNextProcessor` that also makes `routing_segments`; tiles and line ends of an image are context."""

    base_config_class = LlavaNextConfig


class RoeLlavaOnevisionProcessor(RoutedProcessor, LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` that also makes `routing_segments`; a video is context as an image is."""

    base_config_class = LlavaOnevisionConfig


RoeLlavaNextProcessor.register_for_auto_class()
RoeLlavaOnevisionProcessor.register_for_auto_class()

__all__ = ["RoeLlavaNextProcessor", "RoeLlavaOnevisionProcessor"]
