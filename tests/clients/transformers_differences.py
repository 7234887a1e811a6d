"""What transformers' own tests ask that our classes answer otherwise, or that is no question to them.

Patterns of test names and of skipping messages, each with its reason; `ADAPTED` says what the suite is told beforehand,
so that a difference of one word does not hide what the rest of a test asks. The list is that of the tests of 4.52, run
with transformers 4.52.4.
"""

from __future__ import annotations

from peers_suite import Reasons

ADAPTED = {
    "processors of logits": "Those that an option of generate means are ours, by their names: `our_processors.py`.",
    "the config": "The suite gives every model the same fields; those that a Mistral has not are left out, because our "
    "config refuses what nobody reads, and so is an epsilon of 1, which no Mistral has.",
    "remove_invalid_values": "It is left out of the common options: logits that are no numbers are an error here.",
    "use_cache=False": "generate computes each column once whatever it says, so that later steps have the states of "
    "one column; beams hand out no cache.",
    "past_key_values": "A cache is asked in our layout, [B, R, K, H] a layer, which counts real tokens.",
    "output_loading_info": "What is missing is told by a warning, here put into the form that is asked for.",
    "outputs of generate": "They are tuples; the suite assigns to their fields, so they are put into a namespace.",
    "inputs_embeds": "Whether generate takes them is asked of the signature of prepare_inputs_for_generation.",
    "the hub": "Every checkpoint is the small one that is embedded here, with its tokenizer; a text is cut to five "
    "tokens in the tests of generation, whose lengths are those of larger vocabularies.",
}

_TEXTS = "The numbers, texts or lengths that are expected are those of a published checkpoint of another architecture."
_ENCODER = "It is about the inputs of an encoder, and a Mistral is a decoder alone."
_CONSTRAINTS = (
    "Constrained beams are not here: GenerationConfigError names prefix_allowed_tokens_fn and logits_processor."
)
_STATE = "from_pretrained reads checkpoints; parameters in memory are given by load_arrays or load_state_dict."
_SCRIPT = "torch.jit.trace, which PyTorch deprecates, cannot return our cache; torch.compile and torch.export can."
_REFUSED = "A call that is contradictory is refused by another error, or has a meaning here: "

DIFFERENT = {
    # Models
    "MistralModelTest::test_batching_equivalence": "Iterating over an output gives its values, as of any tuple, "
    "and not its names.",
    "MistralModelTest::test_can_load_with_meta_device_context_manager": "What from_pretrained returns always has "
    "values; a model without any is made by its class under torch.device('meta').",
    "MistralModelTest::test_can_init_all_missing_weights": _STATE,
    "MistralModelTest::test_from_pretrained_no_checkpoint": _STATE,
    "MistralModelTest::test_config": "Our config refuses a hidden size that is no multiple of the heads where "
    "head_dim is not given, and fields that it does not have.",
    "MistralModelTest::test_gradient_checkpointing_backward_compatibility": "A config says nothing of how a model is "
    "trained; gradient_checkpointing_enable does.",
    "MistralModelTest::test_inherits_generation_mixin": "generate is our own, the same driver in every framework.",
    "MistralModelTest::test_mismatched_shapes_have_properly_initialized_weights": "A tensor of another shape is an "
    "error; num_labels or resize_token_embeddings make a head or a vocabulary of another size.",
    "MistralModelTest::test_model_weights_reload_no_missing_tied_weights": "A file that was changed after it was "
    "written is told as changed by the manifest beside it.",
    "MistralModelTest::test_resize_tokens_embeddings": "The error for a multiple of 1.3 has our own words.",
    "MistralModelTest::test_save_load": "generation_config.json is written for every class, so that nothing is lost "
    "when another head is put on the checkpoint.",
    "MistralModelTest::test_save_load_low_cpu_mem_usage_no_safetensors": "Weights are written as safetensors only: "
    "pickles run code.",
    "MistralModelTest::test_torchscript_*": _SCRIPT,
    # Generation
    "*: *GenerationConfigError: *num_beam_groups is not here*": "There are no beams in groups; the error names "
    "num_beams, and do_sample for beams that differ.",
    "*: *GenerationConfigError: *constraints is not here*": _CONSTRAINTS,
    "*: *GenerationConfigError: *force_words_ids is not here*": _CONSTRAINTS,
    "*: *GenerationConfigError: generate: penalty_alpha is not here*": "There is no contrastive search; the error "
    "names what is.",
    "GenerationIntegrationTests::test_constrained_beam_search_mixed*": _CONSTRAINTS,
    "*: *GenerationConfigError: *dola_layers is not here*": "There is no DoLa, and the error says so.",
    "*: *GenerationConfigError: generate: remove_invalid_values is not here*": "Logits that are no numbers are an "
    "error.",
    "*: *GenerationConfigError: *guidance_scale is not here*": "The error names the processor that can be given "
    "instead.",
    "LogitsProcessorTest::test_no_bad_words_dist_processor": "An end of sequence among the bad words is forbidden as "
    "it is asked; transformers leaves it out in silence.",
    "LogitsProcessorTest::test_top_p_dist_warper": "Probabilities are summed from the likeliest on, in transformers "
    "from the least likely: where a sum is exactly p, as in this test, rounding decides otherwise.",
    "*: *GenerationConfigError: *watermarking_config is not here*": "The error names the processors that can be given "
    "instead.",
    "*: *GenerationConfigError: *assistant_tokenizer is not here*": "An assistant must have the model's own tokenizer.",
    "*: *has no attribute 'heal_tokens'*": "Where a text is cut is the affair of who wrote it.",
    "MistralModelTest::test_generate_continue_from_inputs_embeds": "A cache is continued by ids; with inputs_embeds "
    "the whole text is given, and an InputError says so.",
    "MistralModelTest::test_generate_continue_from_past_key_values": "The tokens are the same; then the caches of two "
    "calls are compared layer by layer in transformers' layout, and ours is a value of its own.",
    "MistralModelTest::test_past_key_values_format": "A cache is [B, R, K, H] a layer here, with as many slots as it "
    "has room for, and counts real tokens.",
    "GenerationIntegrationTests::test_compare_unprocessed_logit_scores": "generate computes the head for the last "
    "column alone, and a product of another shape is rounded otherwise: the logits are equal to 1e-6, not by bits.",
    "GenerationIntegrationTests::test_custom_logits_processor": _REFUSED
    + "min_length and a processor of it both hold.",
    "GenerationIntegrationTests::test_custom_stopping_criteria_overload_error": _REFUSED + "the first of max_length "
    "and a criterion of it ends a row.",
    "GenerationIntegrationTests::test_generate_inputs_and_encoder_kwargs": _REFUSED + "input_ids given twice is "
    "Python's own TypeError.",
    "GenerationIntegrationTests::test_validate_generation_inputs": _REFUSED + "a row that is all padding is an "
    "EmptyInputError, for there is nothing to continue.",
    "GenerationIntegrationTests::test_default_max_length_warning": "Twenty new tokens where no length is given are "
    "documented, and not warned of.",
    "GenerationIntegrationTests::test_generate_compile_fullgraph_tiny": "generate is no one graph: compile='on' "
    "compiles its steps.",
    "GenerationIntegrationTests::test_assisted_decoding_num_assistant_tokens_heuristic_schedule": "The number of "
    "guesses is what was asked for, and the config of an assistant is never changed.",
    "GenerationIntegrationTests::test_prepare_inputs_for_generation_decoder_llm": "prepare_inputs_for_generation is "
    "our own, for decode loops that others wrote.",
}

NOT_APPLICABLE = {
    "LogitsProcessorTest::*: *is no option of generate": "It is an argument of the class alone: no option of generate, "
    "here or there, says it.",
    "StoppingCriteriaTestCase::test_criterias_per_row*": "The number of tokens of a text, which the criterion of a "
    "length counts, is that of GPT-2's vocabulary.",
    "StoppingCriteriaTestCase::test_single_letter_stop_string": "That 'abc' is one token is so in GPT-2's vocabulary.",
    "StreamerTester::test_text_streamer_decode_kwargs": "GPT-2's tokenizer adds no BOS to a text, a Mistral's does.",
    "GenerationIntegrationTests::test_assisted_generation_early_exit": _TEXTS,
    "GenerationIntegrationTests::test_beam_search_advanced_stopping_criteria": _TEXTS,
    "GenerationIntegrationTests::test_eos_token_id_int_and_list_*": _TEXTS,
    "GenerationIntegrationTests::test_per_row_stopping_criteria": _TEXTS,
    "GenerationIntegrationTests::test_return_unprocessed_logit_scores": _TEXTS,
    "GenerationIntegrationTests::test_transition_scores_greedy_search*": _TEXTS,
    "GenerationIntegrationTests::test_stop_sequence_stopping_criteria": _TEXTS,
    "GenerationIntegrationTests::test_model_kwarg_assisted_decoding_decoder_only": "GPT-2 has token types, of which "
    "the test is; a Mistral has none.",
    "GenerationIntegrationTests::test_batched_decoder_start_id": _ENCODER,
    "GenerationIntegrationTests::test_decoder_start_id_from_config": _ENCODER,
    "GenerationIntegrationTests::test_beam_search_example_integration": _ENCODER,
    "GenerationIntegrationTests::test_constrained_beam_search_example_integration": _ENCODER,
    "GenerationIntegrationTests::test_generate_encoder_outputs_attention_mask": _ENCODER,
    "GenerationIntegrationTests::test_generate_input_features_as_encoder_kwarg": _ENCODER,
    "GenerationIntegrationTests::test_generate_input_values_as_encoder_kwarg": _ENCODER,
    "GenerationIntegrationTests::test_generate_vision2text_conditioning": _ENCODER,
    "GenerationIntegrationTests::test_model_kwarg_encoder_signature_filtering": _ENCODER,
    "GenerationIntegrationTests::test_padding_input_contrastive_search_t5": _ENCODER,
    "GenerationIntegrationTests::test_prepare_inputs_for_generation_encoder_decoder_llm": _ENCODER,
    "GenerationIntegrationTests::test_transition_scores_early_stopping": _ENCODER,
    "GenerationIntegrationTests::test_transition_scores_group_beam_search_encoder_decoder": _ENCODER,
    "GenerationIntegrationTests::test_validate_assistant": _ENCODER,
}

LEFT_OUT = (
    "UtilsFunctionsTest::*",
    "TestAssistedCandidateGenerator*",
    "MistralModelTest::test_prompt_lookup_decoding_stops_at_eos",
    "MistralModelTest::test_generate_with_head_masking",
    "MistralModelTest::test_generation_tester_mixin_inheritance",
    "GenerationIntegrationTests::test_default_assisted_generation",
    "GenerationIntegrationTests::test_max_time",  # within 0.15 s, which a busy machine does not keep
    "LogitsProcessorTest::test_*watermark*",
    "LogitsProcessorTest::test_classifier_free_guidance",
    "LogitsProcessorTest::test_early_stop_processor*",
    "LogitsProcessorTest::test_encoder_*",
    "LogitsProcessorTest::test_hamming_diversity",
    "LogitsProcessorTest::test_remove_nan_inf_logits_processor",
    "StoppingCriteriaTestCase::test_confidence_criteria",
    "StoppingCriteriaTestCase::test_eos_token_criteria",
    "StoppingCriteriaTestCase::test_list_criteria",
    "StoppingCriteriaTestCase::test_max_*_criteria",
    "StoppingCriteriaTestCase::test_stop_string_embedding_vecs",
    "StoppingCriteriaTestCase::test_stop_string_matching_positions",
    "StoppingCriteriaTestCase::test_validate_stopping_criteria",
)
"""Tests of transformers' own functions, of encoders, of the suite itself, or of the machine's speed."""

_OF_ITSELF = "The suite skips it for transformers' own Mistral too."
_CACHES = "Caches of transformers' other kinds are not asked for: ours has a fixed size where a step is compiled."

SKIPPED = {
    "test requires *": "It needs an accelerator or a package that this run has not.",
    "Model is not a composite model.": _OF_ITSELF,
    "MistralModel does not support SDPA": "It is about models of several parts.",
    "Model architecture does not support attentions": _OF_ITSELF,
    "Model class has no _keep_in_fp32_modules attribute defined": _OF_ITSELF,
    "Model does not have position embeddings": _OF_ITSELF,
    "Pruning is not activated": _OF_ITSELF,
    "The model type mistral is not compatible with torch.fx": _OF_ITSELF,
    "test_torch_exportable=False for this model.": _OF_ITSELF,
    "Config not in MODEL_MAPPING": "It is about transformers' registry of its own classes.",
    "Model does not support output_attentions": "The heads take it among the options that they hand to MistralModel.",
    "MistralForCausalLM is not guaranteed to work with custom 4D attention masks": "A mask is [B, T] here: who sees "
    "whom follows from it, from the window and from document_ids.",
    "This model does not support the static cache format": _CACHES,
    "This model doesn't support static cache (= no expectations of compilation support)": _CACHES,
}

REASONS = Reasons(DIFFERENT, NOT_APPLICABLE, SKIPPED)
