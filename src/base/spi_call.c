/*-------------------------------------------------------------------------
 *
 * spi_call.c
 *	  Bookkeeping statements: prepared once, run with our rights.
 *
 * The identity is switched around one statement only, the way referential
 * integrity triggers do it, and search_path is fixed for it, so that nothing
 * a user created can be picked up.  Handlers never run in here.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/namespace.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_namespace.h"
#include "commands/dbcommands.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "base/spi_call.h"

/*
 * Settings of our statements.  A plan that is made while a table is small is
 * kept while it grows: it shall use the index from the start.  Nothing is so large
 * that it is worth starting workers for, whatever the planner thinks of a function.
 */
static const char *const settings[][2] = {
	{"search_path", "pg_catalog, pg_temp"},
	{"enable_seqscan", "off"},
	{"plan_cache_mode", "force_generic_plan"},
	{"jit", "off"},
	{"parallel_setup_cost", "1e100"},
};

/* And of those that look single rows up, or what comes first. */
static const char *const lookup_settings[][2] = {
	{"enable_hashjoin", "off"},
	{"enable_mergejoin", "off"},
	{"enable_sort", "off"},
};

/*
 * Return the role that owns the extension's schema.
 *
 * Needs a transaction.  Throws 42704 when the extension is not there.
 */
Oid
redrive_owner(void)
{
	Oid			namespace = get_namespace_oid("redrive", true);
	HeapTuple	tuple = NULL;
	Oid			owner;

	if (OidIsValid(namespace))
		tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(namespace));
	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"pg_redrive\" does not exist in this database"),
				 errhint("Run CREATE EXTENSION pg_redrive.")));
	owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);
	return owner;
}

/*
 * Are the SQL objects of this database those that this library works with?
 *
 * Between the restart with a new library and ALTER EXTENSION UPDATE they are not; then
 * it complains with elevel.  False, too, when the extension is not there.  Needs a
 * transaction.
 */
bool
redrive_version_fits(int elevel)
{
	Relation	extensions = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	char	   *version = NULL;
	bool		fits;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ, CStringGetDatum("pg_redrive"));
	scan = systable_beginscan(extensions, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		value = heap_getattr(tuple, Anum_pg_extension_extversion, RelationGetDescr(extensions), &isnull);

		version = isnull ? NULL : TextDatumGetCString(value);
	}
	systable_endscan(scan);
	table_close(extensions, AccessShareLock);
	if (version == NULL)
		return false;
	fits = strcmp(version, REDRIVE_VERSION) == 0;
	if (!fits)
		ereport(elevel,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("pg_redrive does not work in database \"%s\" before it is updated", get_database_name(MyDatabaseId)),
				 errdetail("The library is of version %s, the SQL objects of this database are of version %s.", REDRIVE_VERSION, version),
				 errhint("Run ALTER EXTENSION pg_redrive UPDATE in this database; if the library is the older one, restart the server.")));
	pfree(version);
	return fits;
}

/*
 * Run a bookkeeping statement and return the number of rows.
 *
 * The caller is connected to SPI; rows are in SPI_tuptable.  CurrentMemoryContext
 * stays what it is.  nulls is as for SPI_execute_plan.  Throws whatever the
 * statement throws.
 */
uint64
redrive_sql(RedriveSql *sql, Datum *values, const char *nulls)
{
	Oid			save_user;
	int			save_context;
	int			nestlevel;
	int			rc;
	bool		pushed = false;
	MemoryContext old_cxt = CurrentMemoryContext;
	const bool	read_only = false;

	/* a worker has no portal whose snapshot functions could use */
	if (!ActiveSnapshotSet())
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		pushed = true;
	}
	GetUserIdAndSecContext(&save_user, &save_context);
	SetUserIdAndSecContext(redrive_owner(),
						   save_context | SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS);
	nestlevel = NewGUCNestLevel();
	for (int i = 0; i < lengthof(settings); i++)
		(void) set_config_option(settings[i][0], settings[i][1],
								 PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);
	for (int i = 0; sql->lookups && i < lengthof(lookup_settings); i++)
		(void) set_config_option(lookup_settings[i][0], lookup_settings[i][1],
								 PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SAVE, true, 0, false);

	if (sql->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(sql->text, sql->nargs, sql->argtypes);

		if (plan == NULL)
			elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
		if (!sql->once)
			SPI_keepplan(plan);
		sql->plan = plan;
	}
	rc = SPI_execute_plan(sql->plan, values, nulls, read_only, 0);
	if (rc < 0)
		elog(ERROR, "SPI_execute_plan failed: %s", SPI_result_code_string(rc));

	AtEOXact_GUC(true, nestlevel);
	SetUserIdAndSecContext(save_user, save_context);
	if (pushed)
		PopActiveSnapshot();
	MemoryContextSwitchTo(old_cxt); /* SPI leaves its own */
	return SPI_processed;
}

/* The same for a statement on the partitions of one part. */
uint64
redrive_part_sql(RedrivePartSql *sql, int part, Datum *values, const char *nulls)
{
	RedriveSql *own;

	if (part < 0 || part >= REDRIVE_MAX_PARTS)
		elog(ERROR, "part %d does not exist", part);
	own = &sql->parts[part];
	if (own->text == NULL)
	{
		StringInfoData text;
		MemoryContext old_cxt = MemoryContextSwitchTo(TopMemoryContext);

		initStringInfo(&text);
		for (const char *c = sql->text; *c; c++)
		{
			if (*c == '@')
				appendStringInfo(&text, "%d", part);
			else
				appendStringInfoChar(&text, *c);
		}
		own->nargs = sql->nargs;
		memcpy(own->argtypes, sql->argtypes, sizeof(own->argtypes));
		own->text = text.data;
		MemoryContextSwitchTo(old_cxt);
	}
	return redrive_sql(own, values, nulls);
}

/* The same for a statement that must return exactly one row. */
void
redrive_sql_one_row(RedriveSql *sql, Datum *values, const char *nulls)
{
	uint64		rows = redrive_sql(sql, values, nulls);

	if (rows != 1)
		elog(ERROR, "expected one row, got " UINT64_FORMAT, rows);
}

/* Return a column of a result row by its name. */
Datum
redrive_column(int row, const char *name, bool *isnull)
{
	int			fnumber = SPI_fnumber(SPI_tuptable->tupdesc, name);

	if (fnumber <= 0)
		elog(ERROR, "column \"%s\" is missing", name);
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, fnumber, isnull);
}

/* Return a bigint column, 0 when it is NULL. */
int64
redrive_int64(int row, const char *name)
{
	bool		isnull;
	Datum		value = redrive_column(row, name, &isnull);

	return isnull ? 0 : DatumGetInt64(value);
}

/* Return a timestamptz column, 0 when it is NULL. */
TimestampTz
redrive_time(int row, const char *name)
{
	bool		isnull;
	Datum		value = redrive_column(row, name, &isnull);

	return isnull ? 0 : DatumGetTimestampTz(value);
}

/* Return a boolean column, false when it is NULL. */
bool
redrive_bool(int row, const char *name)
{
	bool		isnull;
	Datum		value = redrive_column(row, name, &isnull);

	return isnull ? false : DatumGetBool(value);
}

/* Return a text column as a string in cxt, NULL when it is NULL. */
char *
redrive_text(int row, const char *name, MemoryContext cxt)
{
	bool		isnull;
	Datum		value = redrive_column(row, name, &isnull);
	char	   *result = NULL;

	if (!isnull)
	{
		char	   *local = TextDatumGetCString(value);

		result = MemoryContextStrdup(cxt, local);
		pfree(local);
	}
	return result;
}

/* Free the rows of the last statement, when they are many. */
void
redrive_free_rows(void)
{
	SPI_freetuptable(SPI_tuptable);
	SPI_tuptable = NULL;
}

/* Let a query of the caller read the rows that a trigger is for, by their name. */
void
redrive_trigger_rows(TriggerData *data)
{
	if (SPI_register_trigger_data(data) != SPI_OK_TD_REGISTER)
		elog(ERROR, "SPI_register_trigger_data failed");
}

/*
 * Open a query of the caller, to be read with redrive_query_fetch.
 *
 * Runs with the caller's rights.  Throws 42601 when it is not one query that
 * returns rows, 42804 when its columns are not of these types.
 */
RedriveQuery *
redrive_query_open(const char *text, int ncolumns, Oid *types, const char *expected)
{
	RedriveQuery *query = palloc0(sizeof(RedriveQuery));
	bool		fits;
	const bool	read_only = false;

	query->plan = SPI_prepare(text, 0, NULL);
	if (query->plan == NULL || !SPI_is_cursor_plan(query->plan))
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 errmsg("query must be one statement that returns rows"),
				 errhint("Give a SELECT that yields %s.", expected)));
	query->portal = SPI_cursor_open(NULL, query->plan, NULL, NULL, read_only);
	fits = query->portal->tupDesc != NULL && query->portal->tupDesc->natts == ncolumns;
	for (int i = 0; fits && i < ncolumns; i++)
		fits = TupleDescAttr(query->portal->tupDesc, i)->atttypid == types[i];
	if (!fits)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("the columns of the query do not fit"),
				 errdetail("Expected are %s.", expected),
				 errhint("Cast them, for example SELECT id::text, to_jsonb(t) FROM t.")));
	return query;
}

/* Fetch up to so many rows and return how many came; the previous ones go. */
int
redrive_query_fetch(RedriveQuery *query, int rows)
{
	MemoryContext old_cxt = CurrentMemoryContext;

	if (query->rows != NULL)
		SPI_freetuptable(query->rows);
	SPI_cursor_fetch(query->portal, true, rows);
	query->rows = SPI_tuptable;
	MemoryContextSwitchTo(old_cxt);
	return (int) SPI_processed;
}

/* Return a column, counted from 1, of a fetched row. */
Datum
redrive_query_column(RedriveQuery *query, int row, int column, bool *isnull)
{
	return SPI_getbinval(query->rows->vals[row], query->rows->tupdesc, column, isnull);
}

/* Close the query. */
void
redrive_query_close(RedriveQuery *query)
{
	SPI_cursor_close(query->portal);
	SPI_freeplan(query->plan);
	if (query->rows != NULL)
		SPI_freetuptable(query->rows);
	pfree(query);
}

/* Return an array of n values as an argument of a statement; nulls may be NULL. */
Datum
redrive_array(Oid type, int n, Datum *values, bool *nulls)
{
	int			dims[1] = {n};
	int			lbs[1] = {1};
	int16		len;
	bool		byval;
	char		align;

	get_typlenbyvalalign(type, &len, &byval, &align);
	return PointerGetDatum(construct_md_array(values, nulls, 1, dims, lbs, type, len, byval, align));
}
