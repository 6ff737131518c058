/*-------------------------------------------------------------------------
 *
 * function_name.c
 *	  Names of functions, as users write them and as they are stored.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"

#include "base/compat.h"
#include "flow/handler.h"

/* Add to an error of the server what was given, and how to write it. */
static void
explain_name(void *given)
{
	errdetail("The function was given as \"%s\".", (const char *) given);
	errhint("Write its name or schema.name as in SQL; the function of a handler may have its argument types after that, as in name(jsonb).");
}

/* Return the length of a name without the argument types after it. */
size_t
redrive_name_length(const char *given)
{
	bool		quoted = false;
	const char *end;

	for (end = given; *end != '\0' && (quoted || *end != '('); end++)
		if (*end == '"')
			quoted = !quoted;
	return end - given;
}

/*
 * Check how a user has written the name of a function, and return the function
 * if argument types are written too and there is one.
 *
 * Throws what the server says of names and types, with a hint.
 */
Oid
redrive_parse_name(const char *given, bool with_types)
{
	ErrorContextCallback explain = {error_context_stack, explain_name, unconstify(char *, given)};
	Oid			found = InvalidOid;
	char	   *schema;
	char	   *name;

	error_context_stack = &explain;
	DeconstructQualifiedName(redrive_name_list(with_types ? pnstrdup(given, redrive_name_length(given)) : given), &schema, &name);
	if (with_types)
	{
		LOCAL_FCINFO(call, 1);
		Datum		procedure;

		InitFunctionCallInfoData(*call, NULL, 1, InvalidOid, NULL, NULL);
		call->args[0].value = CStringGetTextDatum(given);
		call->args[0].isnull = false;
		procedure = to_regprocedure(call);
		found = call->isnull ? InvalidOid : DatumGetObjectId(procedure);
	}
	error_context_stack = explain.previous;
	return found;
}

/*
 * Check a function that a user names, and return its qualified name.
 *
 * Throws 42809 when it is no plain function, 42501 when the caller may not
 * execute it.
 */
Datum
redrive_qualified_name(Oid funcid, const char *what, bool set_allowed)
{
	char	   *namespace = get_namespace_name(get_func_namespace(funcid));
	char	   *name = get_func_name(funcid);

	if (get_func_prokind(funcid) != PROKIND_FUNCTION || (get_func_retset(funcid) && !set_allowed))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" cannot be used as %s", name, what),
				 errdetail("It is a procedure, an aggregate, a window function or returns a set."),
				 errhint("Use a plain function; its result is ignored.")));
	if (!redrive_may_execute(funcid, GetUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for function \"%s\"", name),
				 errdetail("It will run as role \"%s\".", GetUserNameFromId(GetUserId(), false)),
				 errhint("Grant EXECUTE on it to that role.")));
	return CStringGetTextDatum(quote_qualified_identifier(namespace, name));
}

/* Say which functions of a name users have made, as a sentence, or "" if there are none. */
char *
redrive_functions_named(const char *given)
{
	List	   *names = redrive_name_list(pnstrdup(given, redrive_name_length(given)));
	StringInfoData list;

	initStringInfo(&list);
	for (FuncCandidateList c = FuncnameGetCandidates(names, -1, NIL, false, false, false, true); c != NULL; c = c->next)
		if (get_func_namespace(c->oid) != PG_CATALOG_NAMESPACE)
			appendStringInfo(&list, "%s%s%s", list.len == 0 ? "There is " : ", ",
							 get_func_prokind(c->oid) == PROKIND_PROCEDURE ? "procedure " : "", format_procedure(c->oid));
	if (list.len > 0)
		appendStringInfoString(&list, ". ");
	return list.data;
}
