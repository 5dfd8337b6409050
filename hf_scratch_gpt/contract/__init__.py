"""Contract tests: what transformers and its clients expect of any causal language model.

    pytest --pyargs hf_scratch_gpt.contract --model-class my_gpt.modeling_my_gpt:MyGPTForCausalLM

They make tiny random models of the class, of standard fields of its configuration, and know nothing
else of it. The docstring of a test says what is expected, whom it serves, and the cure. The slow
ones run last; `-m "not contract_slow"` leaves them out. The extra `contract` brings what they need.
"""
