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
extern Datum redrive_dispatch(FunctionCallInfo fcinfo, int nargs, Oid *argtypes, Datum *values, char *nulls);

#endif							/* REDRIVE_HANDLER_H */
