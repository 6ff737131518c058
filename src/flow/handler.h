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

extern Oid	redrive_type(const char *name);
extern Oid	redrive_find_function(const char *name, HandlerSignature signature, bool missing_ok);
extern Oid	redrive_find_callback(const char *name, bool on_finish, bool missing_ok);
extern Datum redrive_qualified_name(Oid funcid, const char *what, bool set_allowed);
extern void redrive_check_owner_can_login(const char *what);
extern Datum redrive_as_owner(PG_FUNCTION_ARGS);
extern Datum redrive_dispatch(FunctionCallInfo fcinfo, int nargs, Oid *argtypes, Datum *values, char *nulls);

#endif							/* REDRIVE_HANDLER_H */
