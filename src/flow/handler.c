/*-------------------------------------------------------------------------
 *
 * handler.c
 *	  Handlers: their functions, by name; and the door through which SQL
 *	  functions reach their internal counterparts.
 *
 * A function is looked up once, in the caller's search_path and with the
 * caller's rights, and stored by its qualified name, so that dump, restore and
 * pg_upgrade work; it is looked up by that name again for each chunk.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "parser/parse_func.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/syscache.h"

#include "base/compat.h"
#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/handler.h"
#include "flow/set.h"

/* of create_handler: on_unlock and on_finish, then notify */
#define CALLBACK_ARGS 15

static const char *const signature_names[] = {"payload", "key_payload", "item", "items"};

PG_FUNCTION_INFO_V1(redrive_as_owner);
PG_FUNCTION_INFO_V1(redrive_rows_as_owner);
PG_FUNCTION_INFO_V1(redrive_create_handler);
PG_FUNCTION_INFO_V1(redrive_alter_handler);

/* Return the type of this name in our schema. */
Oid
redrive_type(const char *name)
{
	Oid			namespace = get_namespace_oid("redrive", false);

	return GetSysCacheOid2(TYPENAMENSP, Anum_pg_type_oid,
						   CStringGetDatum(name), ObjectIdGetDatum(namespace));
}

/* Fill the argument types of a signature and return their number. */
static int
signature_types(HandlerSignature signature, Oid *types)
{
	switch (signature)
	{
		case SIGNATURE_PAYLOAD:
			types[0] = JSONBOID;
			return 1;
		case SIGNATURE_KEY_PAYLOAD:
			types[0] = TEXTOID;
			types[1] = JSONBOID;
			return 2;
		case SIGNATURE_ITEM:
			types[0] = redrive_type("item");
			return 1;
		case SIGNATURE_ITEMS:
			types[0] = get_array_type(redrive_type("item"));
			return 1;
	}
	return 0;
}

/*
 * Find the function of a handler by its stored name.
 *
 * Throws 42883 when there is none, unless missing_ok; 3F000 when its schema is
 * gone.
 */
Oid
redrive_find_function(const char *name, HandlerSignature signature, bool missing_ok)
{
	Oid			types[2];
	int			nargs = signature_types(signature, types);

	return LookupFuncName(redrive_name_list(name), nargs, types, missing_ok);
}

/* Find a callback by its stored name, or NULL if missing_ok. */
Oid
redrive_find_callback(const char *name, CallbackKind kind, bool missing_ok)
{
	Oid			types[2] = {TEXTOID};
	int			nargs = 1;

	if (kind == CALLBACK_ON_FINISH)
	{
		types[0] = INT8OID;
		types[1] = INT4OID;
		nargs = 2;
	}
	else if (kind == CALLBACK_BUILD)
		types[0] = redrive_type("task");
	return LookupFuncName(redrive_name_list(name), nargs, types, missing_ok);
}

/*
 * Find the function of a row or set handler that a user means: "f", "schema.f" or
 * with argument types.  Looks in the caller's search_path.
 */
static Oid
find_function(const char *given, bool is_set_handler, HandlerSignature *signature)
{
	const HandlerSignature last = is_set_handler ? SIGNATURE_ITEMS : SIGNATURE_ITEM;
	Oid			found = InvalidOid;
	const bool	has_types = given[redrive_name_length(given)] != '\0';
	Oid			exact = redrive_parse_name(given, has_types);

	for (HandlerSignature s = is_set_handler ? SIGNATURE_ITEMS : SIGNATURE_PAYLOAD; s <= last; s++)
	{
		Oid			candidate = InvalidOid;

		if (OidIsValid(exact))
		{
			Oid			types[2];
			Oid		   *actual;
			int			nargs;

			(void) get_func_signature(exact, &actual, &nargs);
			candidate = nargs == signature_types(s, types) &&
				memcmp(actual, types, nargs * sizeof(Oid)) == 0 ? exact : InvalidOid;
		}
		else if (!has_types)
			candidate = redrive_find_function(given, s, true);
		if (!OidIsValid(candidate))
			continue;
		if (OidIsValid(found))
			ereport(ERROR,
					(errcode(ERRCODE_AMBIGUOUS_FUNCTION),
					 errmsg("function name \"%s\" is not unique", given),
					 errdetail("More than one function of this name fits a row handler."),
					 errhint("Write the argument types too, for example %s(jsonb).", given)));
		found = candidate;
		*signature = s;
	}
	if (!OidIsValid(found))
	{
		char	   *seen = redrive_functions_named(given);

		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function \"%s\" does not exist or does not fit a %s handler", given, is_set_handler ? "set" : "row"),
				 is_set_handler ? errdetail("%sA set handler is a function of (items redrive.item[]).", seen) :
				 errdetail("%sA row handler is a function of (payload jsonb), (key text, payload jsonb) or (item redrive.item).", seen),
				 seen[0] != '\0' ? errhint("Give it these arguments, or call it from a function that has them.") :
				 errhint("Create the function first, or write its schema if it is not in search_path.")));
	}
	return found;
}

/*
 * Find the callback that a user means, in the caller's search_path, and return its
 * qualified name.
 */
Datum
redrive_callback_name(Datum given, CallbackKind kind)
{
	static const char *const names[] = {"on_unlock", "on_finish", "build"};
	static const char *const calls[] = {"(key text)", "(batch_id bigint, run_no int)", "(task redrive.task) and returns jsonb"};
	char	   *name = TextDatumGetCString(given);
	Oid			found;

	(void) redrive_parse_name(name, false);
	found = redrive_find_callback(name, kind, true);
	if (!OidIsValid(found) || (kind == CALLBACK_BUILD && get_func_rettype(found) != JSONBOID))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function \"%s\" does not exist or does not fit %s", name, names[kind]),
				 errdetail("It is called with %s.", calls[kind]),
				 errhint("Create the function first, or write its schema if it is not in search_path.")));
	return redrive_qualified_name(found, names[kind], false);
}

/*
 * Run redrive._<name> with the rights of the extension, for the SQL function
 * <name> that was called; how is the statement, with %s for the call.
 *
 * fcinfo only tells the name.  Needs a connection; the rows are read with
 * redrive_column().  Returns their number.
 */
static uint64
run_internal(FunctionCallInfo fcinfo, const char *how, int nargs, Oid *argtypes, Datum *values, char *nulls)
{
	RedriveSql	sql = {0};
	StringInfoData call;
	StringInfoData text;

	initStringInfo(&call);
	appendStringInfo(&call, "redrive.%s(",
					 quote_identifier(psprintf("_%s", get_func_name(fcinfo->flinfo->fn_oid))));
	for (int i = 0; i < nargs; i++)
	{
		appendStringInfo(&call, "%s$%d", i > 0 ? ", " : "", i + 1);
		sql.argtypes[i] = argtypes[i];
	}
	appendStringInfoChar(&call, ')');
	initStringInfo(&text);
	appendStringInfo(&text, how, call.data);
	sql.text = text.data;
	sql.once = true;
	sql.nargs = nargs;
	return redrive_sql(&sql, values, nulls);
}

/*
 * Call redrive._<name> with the rights of the extension, for the SQL function
 * <name> that was called, and return its result.
 *
 * values are passed as they are, fcinfo only tells the name and result type.
 */
Datum
redrive_dispatch(FunctionCallInfo fcinfo, int nargs, Oid *argtypes, Datum *values, char *nulls)
{
	Oid			rettype = get_func_rettype(fcinfo->flinfo->fn_oid);
	MemoryContext caller_cxt = CurrentMemoryContext;
	Datum		result;
	bool		isnull;

	if (func_volatile(fcinfo->flinfo->fn_oid) == PROVOLATILE_VOLATILE)
		redrive_require_writable(fcinfo);
	redrive_connect();
	if (run_internal(fcinfo, "SELECT %s AS result", nargs, argtypes, values, nulls) != 1)
		elog(ERROR, "an internal function did not return one row");
	result = redrive_column(0, "result", &isnull);
	if (!isnull && rettype != VOIDOID)
	{
		int16		len;
		bool		byval;
		MemoryContext spi_cxt = MemoryContextSwitchTo(caller_cxt);

		get_typlenbyval(rettype, &len, &byval);
		result = datumCopy(result, byval, len);
		MemoryContextSwitchTo(spi_cxt);
	}
	redrive_disconnect();
	fcinfo->isnull = isnull && rettype != VOIDOID;
	return fcinfo->isnull || rettype == VOIDOID ? (Datum) 0 : result;
}

/*
 * Fill the arguments of an internal function: the caller's role, which SQL
 * cannot forge, and what the SQL function was called with.  Returns how many.
 */
static int
caller_and_arguments(FunctionCallInfo fcinfo, Oid *argtypes, Datum *values, char *nulls)
{
	Oid		   *declared;
	int			nargs;

	(void) get_func_signature(fcinfo->flinfo->fn_oid, &declared, &nargs);
	argtypes[0] = OIDOID;
	values[0] = ObjectIdGetDatum(GetUserId());
	nulls[0] = ' ';
	for (int i = 0; i < nargs; i++)
	{
		argtypes[i + 1] = declared[i];
		values[i + 1] = fcinfo->args[i].value;
		nulls[i + 1] = fcinfo->args[i].isnull ? 'n' : ' ';
	}
	return nargs + 1;
}

/* The C side of the control functions: pass the caller and the arguments on. */
Datum
redrive_as_owner(PG_FUNCTION_ARGS)
{
	Oid			argtypes[REDRIVE_MAX_ARGS];
	Datum		values[REDRIVE_MAX_ARGS];
	char		nulls[REDRIVE_MAX_ARGS + 1] = {0};
	int			nargs = caller_and_arguments(fcinfo, argtypes, values, nulls);

	return redrive_dispatch(fcinfo, nargs, argtypes, values, nulls);
}

/* The same for functions that return rows, with columns of the same names. */
Datum
redrive_rows_as_owner(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Oid			argtypes[REDRIVE_MAX_ARGS];
	Datum		values[REDRIVE_MAX_ARGS];
	char		nulls[REDRIVE_MAX_ARGS + 1] = {0};
	int			nargs = caller_and_arguments(fcinfo, argtypes, values, nulls);
	uint64		rows;

	InitMaterializedSRF(fcinfo, 0);
	redrive_connect();
	rows = run_internal(fcinfo, "SELECT * FROM %s", nargs, argtypes, values, nulls);
	for (uint64 row = 0; row < rows; row++)
	{
		Datum		columns[REDRIVE_MAX_ARGS];
		bool		isnull[REDRIVE_MAX_ARGS];

		for (int c = 0; c < rsinfo->setDesc->natts; c++)
			columns[c] = redrive_column(row, NameStr(TupleDescAttr(rsinfo->setDesc, c)->attname), &isnull[c]);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, columns, isnull);
	}
	redrive_disconnect();
	return (Datum) 0;
}

/* Refuse an owner, of what, that no worker could connect as. */
void
redrive_check_owner_can_login(const char *what)
{
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(GetUserId()));
	bool		can_login;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for role %u", GetUserId());
	can_login = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	ReleaseSysCache(tuple);
	if (!can_login && REDRIVE_OWNER_NEEDS_LOGIN)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("role \"%s\" cannot own %s", GetUserNameFromId(GetUserId(), false), what),
				 errdetail("It is not permitted to log in, and workers connect as the owner."),
				 errhint("Run ALTER ROLE ... LOGIN, or create %s as another role.", strcmp(what, "a handler") == 0 ? "the handler" : "the platform")));
}

/* Is this the name of a set handler? */
static bool
is_set_handler(Datum name)
{
	static RedriveSql find_kind = {
		"SELECT h.kind = 'set' AS is_set FROM redrive.handlers AS h WHERE h.name = $1",
		1, {TEXTOID}
	};
	bool		result;

	redrive_connect();
	result = redrive_sql(&find_kind, &name, NULL) == 1 && redrive_bool(0, "is_set");
	redrive_disconnect();
	return result;
}

/*
 * create_handler and alter_handler: resolve the functions that the caller
 * names, then pass everything on.
 */
static Datum
put_handler(FunctionCallInfo fcinfo, bool create)
{
	Oid			argtypes[REDRIVE_MAX_ARGS];
	Datum		values[REDRIVE_MAX_ARGS];
	char		nulls[REDRIVE_MAX_ARGS + 1] = {0};
	const int	first = 2;		/* caller and signature come before */
	const int	function_arg = 1,
				kind_arg = 2,
				unlock_arg = CALLBACK_ARGS,
				finish_arg = CALLBACK_ARGS + 1;
	Oid		   *declared;
	int			nargs;
	bool		set = false;
	bool		external = false;

	(void) get_func_signature(fcinfo->flinfo->fn_oid, &declared, &nargs);
	for (int i = 0; i < nargs; i++)
	{
		argtypes[first + i] = declared[i];
		values[first + i] = fcinfo->args[i].value;
		nulls[first + i] = fcinfo->args[i].isnull ? 'n' : ' ';
	}
	argtypes[0] = OIDOID;
	values[0] = ObjectIdGetDatum(GetUserId());
	nulls[0] = ' ';
	argtypes[1] = TEXTOID;
	values[1] = (Datum) 0;
	nulls[1] = 'n';

	if (create && !PG_ARGISNULL(kind_arg))
	{
		Datum		kind = OidFunctionCall1(F_ENUM_OUT, PG_GETARG_DATUM(kind_arg));

		set = strcmp(DatumGetCString(kind), "set") == 0;
		external = strcmp(DatumGetCString(kind), "external") == 0;
		if (external && !PG_ARGISNULL(function_arg))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("a handler of kind \"external\" has no function"),
					 errhint("Its items are claimed by applications with redrive.claim().")));
		if (PG_ARGISNULL(function_arg) && !external)
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("function must not be null for a handler of kind \"%s\"", DatumGetCString(kind)),
					 set ? errhint("Name a function of (items redrive.item[]).") :
					 errhint("Name a function of (payload jsonb), (key text, payload jsonb) or (item redrive.item).")));
	}
	/* workers of ours only run the callbacks of an external handler */
	if (create && !(external && PG_ARGISNULL(unlock_arg) && PG_ARGISNULL(finish_arg)))
		redrive_check_owner_can_login("a handler");

	if (!PG_ARGISNULL(function_arg))
	{
		HandlerSignature signature = SIGNATURE_PAYLOAD;
		Oid			funcid;

		if (!create && !PG_ARGISNULL(0))
			set = is_set_handler(PG_GETARG_DATUM(0));
		funcid = find_function(text_to_cstring(PG_GETARG_TEXT_PP(function_arg)), set, &signature);
		values[first + function_arg] = redrive_qualified_name(funcid, set ? "a set handler" : "a row handler", set);
		if (set)
			(void) redrive_check_set_result(funcid);
		values[1] = CStringGetTextDatum(signature_names[signature]);
		nulls[1] = ' ';
	}
	if (!PG_ARGISNULL(unlock_arg))
		values[first + unlock_arg] =
			redrive_callback_name(PG_GETARG_DATUM(unlock_arg), CALLBACK_ON_UNLOCK);
	if (!PG_ARGISNULL(finish_arg))
		values[first + finish_arg] =
			redrive_callback_name(PG_GETARG_DATUM(finish_arg), CALLBACK_ON_FINISH);

	return redrive_dispatch(fcinfo, first + nargs, argtypes, values, nulls);
}

Datum
redrive_create_handler(PG_FUNCTION_ARGS)
{
	return put_handler(fcinfo, true);
}

Datum
redrive_alter_handler(PG_FUNCTION_ARGS)
{
	return put_handler(fcinfo, false);
}
