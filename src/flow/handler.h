/*-------------------------------------------------------------------------
 *
 * handler.h
 *	  Handlers: their functions, by name.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_HANDLER_H
#define REDRIVE_HANDLER_H

#include "flow/batch.h"

/* Functions that a handler or platform may name beside the handler's own. */
typedef enum CallbackKind
{
	CALLBACK_ON_UNLOCK,			/* (key text) */
	CALLBACK_ON_FINISH,			/* (batch_id bigint, run_no int) */
	CALLBACK_BUILD				/* (redrive.task), returns jsonb */
} CallbackKind;

extern Oid	redrive_type(const char *name);
extern Oid	redrive_find_function(const char *name, HandlerSignature signature, bool missing_ok);
extern Oid	redrive_find_callback(const char *name, CallbackKind kind, bool missing_ok);
extern Datum redrive_callback_name(Datum given, CallbackKind kind);
extern size_t redrive_name_length(const char *given);
extern Oid	redrive_parse_name(const char *given, bool with_types);
extern char *redrive_functions_named(const char *given);
extern Datum redrive_qualified_name(Oid funcid, const char *what, bool set_allowed);
extern void redrive_check_owner_can_login(const char *what);
extern Datum redrive_as_owner(PG_FUNCTION_ARGS);
extern Datum redrive_dispatch(FunctionCallInfo fcinfo, int nargs, Oid *argtypes, Datum *values, char *nulls);

#endif							/* REDRIVE_HANDLER_H */
