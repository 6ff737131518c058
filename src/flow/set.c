/*-------------------------------------------------------------------------
 *
 * set.c
 *	  Call a set handler: its items as an array, its answer as outcomes.
 *
 * Runs inside the segment (segment.c).  An outcome that does not fit the call is
 * an error of the handler and of no item; call->judging tells it apart from an
 * error that the handler raised.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "executor/executor.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "flow/handler.h"
#include "flow/set.h"

/* The columns of redrive.outcome, in the type's order. */
enum
{
	O_ITEM_NO, O_OUTCOME, O_MESSAGE, O_CODE, O_DELAY, O_COLUMNS
};

/* A delay of an outcome is between 0 and this, as that of a handler. */
#define MAX_DELAY_MONTHS (100 * MONTHS_PER_YEAR)

/*
 * Check what the function of a set handler returns: false for void, true for
 * outcomes.  Throws 42809 for anything else.
 */
bool
redrive_check_set_result(Oid funcid)
{
	Oid			type = get_func_rettype(funcid);
	bool		set = get_func_retset(funcid);

	if (type == VOIDOID && !set)
		return false;
	if (type == redrive_type("outcome") && set)
		return true;
	ereport(ERROR,
			(errcode(ERRCODE_WRONG_OBJECT_TYPE),
			 errmsg("function \"%s\" cannot be used as a set handler, it returns %s%s", get_func_name(funcid),
					set ? "SETOF " : "", format_type_be(type)),
			 errhint("Let it return void, or SETOF redrive.outcome.")));
}

/* Make the array of the items from page index "from" up to "to". */
Datum
redrive_set_argument(RedriveCall *call, int from, int to)
{
	Datum	   *items = palloc((to - from) * sizeof(Datum));

	for (int i = from; i < to; i++)
		items[i - from] = redrive_item_datum(call, &call->chunk->page[i]);
	return PointerGetDatum(construct_array(items, to - from, call->item_desc->tdtypeid, -1, false, TYPALIGN_DOUBLE));
}

/* Refuse an outcome: what is wrong with it, in words that follow the handler's name. */
static void
refuse(RedriveCall *call, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_REDRIVE_BAD_OUTCOME),
			 errmsg("handler \"%s\" returned %s", call->chunk->handler.name, what)));
}

/* Return the page index of an item of the call. */
static int
find_item(RedriveCall *call, int64 item_no, int from, int to)
{
	RedriveItem *page = call->chunk->page;
	int			low = from;
	int			high = to - 1;

	while (low < high)
	{
		int			middle = (low + high) / 2;

		if (page[middle].item_no < item_no)
			low = middle + 1;
		else
			high = middle;
	}
	if (page[low].item_no != item_no)
		refuse(call, psprintf("an outcome for item %lld, which is not one of the %d items of the call, %lld to %lld",
							  (long long) item_no, to - from,
							  (long long) page[from].item_no, (long long) page[to - 1].item_no));
	return low;
}

static OutcomeKind
parse_kind(Datum value)
{
	static const char *const names[] = {"ok", "ignored", "failed", "retry", "snoozed"};
	char	   *name = DatumGetCString(OidFunctionCall1(F_ENUM_OUT, value));

	for (int i = 0; i < lengthof(names); i++)
		if (strcmp(name, names[i]) == 0)
			return (OutcomeKind) i;
	elog(ERROR, "unknown outcome \"%s\"", name);
}

/* Is a delay something to wait for? */
static bool
is_delay(Interval *delay)
{
	Interval	none = {0};
	Interval	longest = {.month = MAX_DELAY_MONTHS};

	return DatumGetBool(DirectFunctionCall2(interval_ge, IntervalPGetDatum(delay), IntervalPGetDatum(&none))) &&
		DatumGetBool(DirectFunctionCall2(interval_le, IntervalPGetDatum(delay), IntervalPGetDatum(&longest)));
}

/* Keep one outcome; said: the items that have one already. */
static void
take_outcome(RedriveCall *call, int from, int to, bool *said, Datum *values, bool *nulls)
{
	RedriveOutcome *outcome = &call->outcomes[call->n_outcomes];
	int64		item_no = DatumGetInt64(values[O_ITEM_NO]);

	if (nulls[O_ITEM_NO])
		refuse(call, "an outcome without item_no");
	outcome->index = find_item(call, item_no, from, to);
	if (said[outcome->index - from])
		refuse(call, psprintf("two outcomes for item %lld", (long long) item_no));
	if (nulls[O_OUTCOME])
		refuse(call, psprintf("NULL as outcome of item %lld", (long long) item_no));
	said[outcome->index - from] = true;
	outcome->kind = parse_kind(values[O_OUTCOME]);
	outcome->message = nulls[O_MESSAGE] ? NULL : TextDatumGetCString(values[O_MESSAGE]);
	outcome->code = nulls[O_CODE] ? NULL : TextDatumGetCString(values[O_CODE]);
	outcome->delay = NULL;
	if (!nulls[O_DELAY])
	{
		outcome->delay = palloc(sizeof(Interval));
		*outcome->delay = *DatumGetIntervalP(values[O_DELAY]);
		if (!is_delay(outcome->delay))
			refuse(call, psprintf("a delay of %s for item %lld; it must be between 0 and 100 years",
								  DatumGetCString(DirectFunctionCall1(interval_out, values[O_DELAY])),
								  (long long) item_no));
	}
	call->n_outcomes++;
}

/*
 * Read the outcomes of the items from page index "from" up to "to" into
 * call->outcomes, which lives until the next call.  Throws RD005.
 */
void
redrive_take_outcomes(RedriveCall *call, Tuplestorestate *rows, int from, int to)
{
	TupleTableSlot *slot = MakeSingleTupleTableSlot(call->outcome_desc, &TTSOpsMinimalTuple);
	bool	   *said = palloc0((to - from) * sizeof(bool));

	call->judging = true;
	call->outcomes = palloc((to - from) * sizeof(RedriveOutcome));
	while (tuplestore_gettupleslot(rows, true, false, slot))
	{
		slot_getallattrs(slot);
		take_outcome(call, from, to, said, slot->tts_values, slot->tts_isnull);
	}
	ExecDropSingleTupleTableSlot(slot);
	tuplestore_end(rows);
	call->judging = false;
}

/* Refuse rows of another type than was declared: languages like C can do that. */
static void
refuse_rows(RedriveCall *call)
{
	ereport(ERROR,
			(errcode(ERRCODE_DATATYPE_MISMATCH),
			 errmsg("function %s returned rows that are not of type redrive.outcome", call->chunk->handler.function)));
}

/* Add a row that a function returned by itself to those it returned before. */
static void
put_row(RedriveCall *call, Tuplestorestate *rows, Datum row, bool isnull)
{
	Datum		values[O_COLUMNS] = {0};
	bool		nulls[O_COLUMNS];

	memset(nulls, true, sizeof(nulls));
	if (!isnull)
	{
		HeapTupleData tuple = {0};

		tuple.t_data = DatumGetHeapTupleHeader(row);
		if (HeapTupleHeaderGetTypeId(tuple.t_data) != call->outcome_desc->tdtypeid)
			refuse_rows(call);
		tuple.t_len = HeapTupleHeaderGetDatumLength(tuple.t_data);
		heap_deform_tuple(&tuple, call->outcome_desc, values, nulls);
	}
	tuplestore_putvalues(rows, call->outcome_desc, values, nulls);
}

/*
 * Call a function that returns outcomes.  Languages do so in one of two ways: all
 * rows at once, or one for each call.  The result is in CurrentMemoryContext.
 */
Tuplestorestate *
redrive_call_for_outcomes(RedriveCall *call)
{
	ReturnSetInfo result = {.type = T_ReturnSetInfo};
	Tuplestorestate *rows = tuplestore_begin_heap(false, false, work_mem);

	result.econtext = CreateStandaloneExprContext();
	result.expectedDesc = call->outcome_desc;
	result.allowedModes = SFRM_ValuePerCall | SFRM_Materialize | SFRM_Materialize_Preferred;
	call->fcinfo->resultinfo = (Node *) &result;
	do
	{
		Datum		row;

		result.returnMode = SFRM_ValuePerCall;
		result.isDone = ExprSingleResult;
		call->fcinfo->isnull = false;
		row = FunctionCallInvoke(call->fcinfo);
		if (result.returnMode == SFRM_ValuePerCall && result.isDone != ExprEndResult)
			put_row(call, rows, row, call->fcinfo->isnull);
	} while (result.returnMode == SFRM_ValuePerCall && result.isDone == ExprMultipleResult);
	call->fcinfo->resultinfo = NULL;
	if (result.returnMode == SFRM_Materialize && result.setResult != NULL)
	{
		if (result.setDesc != NULL && result.setDesc->natts != O_COLUMNS)
			refuse_rows(call);
		tuplestore_end(rows);
		rows = result.setResult;
	}
	FreeExprContext(result.econtext, true);
	return rows;
}
