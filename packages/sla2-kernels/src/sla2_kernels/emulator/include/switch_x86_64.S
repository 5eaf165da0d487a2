// Switches the stack: saves the callee-saved registers and the stack pointer in *save (rdi), then
// goes on at `load` (rsi).
    .text
    .globl sla2_switch_stack
    .hidden sla2_switch_stack
    .type sla2_switch_stack, @function
sla2_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size sla2_switch_stack, .-sla2_switch_stack
    .section .note.GNU-stack, "", @progbits
