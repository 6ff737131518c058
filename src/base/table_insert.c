/*-------------------------------------------------------------------------
 *
 * table_insert.c
 *	  Insert many rows into a table of ours.
 *
 * As COPY does it: whole pages at a time, no plan, no executor.  Indexes and
 * unique constraints are kept; CHECKs are tested in assert builds only, since
 * the rows are made in C.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "executor/executor.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "base/compat.h"
#include "base/table_insert.h"

#define ROWS_AT_ONCE 100

/*
 * Insert rows into redrive.table; values and nulls are row by row, all columns
 * in the table's order.
 *
 * Needs a transaction; nobody's rights are asked.  Throws 42P01 when the table
 * is not there, 23505 for a row that is there already.
 */
void
redrive_table_insert(const char *table, int columns, int rows, Datum *values, bool *nulls)
{
	Oid			relid = get_relname_relid(table, get_namespace_oid("redrive", false));
	Relation	rel;
	EState	   *estate;
	ResultRelInfo *result;
	TupleTableSlot *slots[ROWS_AT_ONCE];
	const int	room = Min(rows, ROWS_AT_ONCE);

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table redrive.%s does not exist", table)));
	rel = table_open(relid, RowExclusiveLock);
	if (RelationGetNumberOfAttributes(rel) != columns)
		elog(ERROR, "table redrive.%s has %d columns, not %d", table, RelationGetNumberOfAttributes(rel), columns);
	estate = CreateExecutorState();
	result = makeNode(ResultRelInfo);
	InitResultRelInfo(result, rel, 1, NULL, 0);
	ExecOpenIndices(result, false);
	for (int i = 0; i < room; i++)
		slots[i] = table_slot_create(rel, &estate->es_tupleTable);

	for (int done = 0; done < rows; done += room)
	{
		const int	n = Min(rows - done, room);
		MemoryContext old_cxt;

		for (int i = 0; i < n; i++)
		{
			ExecClearTuple(slots[i]);
			memcpy(slots[i]->tts_values, values + (Size) (done + i) * columns, columns * sizeof(Datum));
			memcpy(slots[i]->tts_isnull, nulls + (Size) (done + i) * columns, columns * sizeof(bool));
			ExecStoreVirtualTuple(slots[i]);
#ifdef USE_ASSERT_CHECKING
			ExecConstraints(result, slots[i], estate);
#endif
		}
		ResetPerTupleExprContext(estate);
		old_cxt = MemoryContextSwitchTo(GetPerTupleMemoryContext(estate));
		table_multi_insert(rel, slots, n, GetCurrentCommandId(true), 0, NULL);
		MemoryContextSwitchTo(old_cxt);
		for (int i = 0; i < n; i++)
			list_free(redrive_insert_index_tuples(result, slots[i], estate));
	}

	ExecResetTupleTable(estate->es_tupleTable, false);
	ExecCloseIndices(result);
	FreeExecutorState(estate);
	table_close(rel, NoLock);
	CommandCounterIncrement();
}

/* Return a label of an enum type of ours. */
Datum
redrive_enum(const char *type, const char *label)
{
	Oid			typid = GetSysCacheOid2(TYPENAMENSP, Anum_pg_type_oid, CStringGetDatum(type),
										ObjectIdGetDatum(get_namespace_oid("redrive", false)));

	return DirectFunctionCall2(enum_in, CStringGetDatum(label), ObjectIdGetDatum(typid));
}
